//! The switches of the shadow backend. Every optimisation is one, on by default, so that its worth can be measured; what
//! the guest sees is the same with any of them off.

/// How the shadow backend works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Map the guest's large pages by large entries where memory, write protection and the dirty log allow it.
    pub large_pages: bool,
    /// Mark device pages by malformed entries, so that the next access is answered without a walk of the guest's tables.
    pub mmio_markers: bool,
    /// After a trapped write to a guest table fill the leaf that the new entry asks for, so that its first use does not
    /// fault.
    pub eager_update: bool,
    /// Stop shadowing a guest table that is written again and again without being used in between.
    pub flood_zap: bool,
    /// Let a leaf table that is written entry after entry go out of sync until it is used again.
    pub unsync: bool,
    /// Stop shadowing a root that the guest has emptied, or has not loaded for long.
    pub dead_roots: bool,
    /// Give a new root the links of the kernel's half whose tables are shadowed already, so that their first use does not
    /// fault.
    pub root_links: bool,
    /// When a frame is no table any more, let entries permit writes to it again, so that its next use does not fault.
    pub give_back: bool,
    /// Mark entries that the guest's table lacks too, so that the CPU delivers the guest's own faults there without an exit.
    pub absent_marks: bool,
    /// Answer a table write through the page that the last one went through without a walk of the guest's tables.
    pub write_recall: bool,
    /// While CR0.WP = 0, give a read-only user page to the supervisor for writing instead of doing each store for it.
    pub wp_flip: bool,
    /// The most shadow pages there may be; `None` for as many as there are table frames. One fault needs up to six, and
    /// an instruction that touches ten pages up to fifty at once: with fewer than that, it might never complete.
    pub page_cap: Option<usize>,
    /// Check every invariant after every event. For tests: the cost is that of walking every shadow page.
    pub audit_every_event: bool,
    /// A rule to break on purpose.
    #[cfg(feature = "seeded-faults")]
    pub seeded: Option<crate::Seeded>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            large_pages: true,
            mmio_markers: true,
            eager_update: true,
            flood_zap: true,
            unsync: true,
            dead_roots: true,
            root_links: true,
            give_back: true,
            absent_marks: true,
            write_recall: true,
            wp_flip: true,
            page_cap: None,
            audit_every_event: false,
            #[cfg(feature = "seeded-faults")]
            seeded: None,
        }
    }
}

impl Options {
    /// The optimisations by name, with what each does.
    pub const SWITCHES: &'static [(&'static str, &'static str)] = &[
        ("large-pages", "large guest pages are mapped by large shadow entries"),
        ("mmio-markers", "device pages are marked in shadow tables"),
        ("eager-update", "a trapped table write fills the new leaf at once"),
        ("flood-zap", "tables written again and again are no longer shadowed"),
        ("unsync", "a leaf table written entry after entry goes out of sync until its next use"),
        ("dead-roots", "roots that the guest has emptied or left long ago are no longer shadowed"),
        ("root-links", "a new root has the links of the kernel's half at once"),
        ("give-back", "a frame that is no table any more can be written without a fault"),
        (
            "absent-marks",
            "faults at entries that the guest's table is known to lack go to the guest without an exit",
        ),
        ("write-recall", "table writes through the page of the last one are answered without a walk"),
        (
            "wp-flip",
            "with CR0.WP = 0, read-only user pages change hands instead of each store being done by the engine",
        ),
    ];

    /// The switch of that name, or `None` if there is no such switch.
    pub fn switch(&mut self, name: &str) -> Option<&mut bool> {
        Some(match name {
            "large-pages" => &mut self.large_pages,
            "mmio-markers" => &mut self.mmio_markers,
            "eager-update" => &mut self.eager_update,
            "flood-zap" => &mut self.flood_zap,
            "unsync" => &mut self.unsync,
            "dead-roots" => &mut self.dead_roots,
            "root-links" => &mut self.root_links,
            "give-back" => &mut self.give_back,
            "absent-marks" => &mut self.absent_marks,
            "write-recall" => &mut self.write_recall,
            "wp-flip" => &mut self.wp_flip,
            _ => return None,
        })
    }

    /// All optimisations off: the plain algorithm, to measure against.
    pub fn plain() -> Self {
        let mut options = Self::default();
        for (name, _) in Self::SWITCHES {
            if let Some(switch) = options.switch(name) {
                *switch = false;
            }
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_switch_has_a_name_and_is_on_by_default() {
        let mut options = Options::default();
        for (name, _) in Options::SWITCHES {
            assert!(*options.switch(name).unwrap(), "{name} is off by default");
        }
        assert_eq!(options.switch("no-such-switch"), None);
        assert_ne!(Options::plain(), options);
    }
}

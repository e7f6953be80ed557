//! The choice between the engines of the software CPU, as it is written on the command line.
//!
//! It stands before the machine is built: [`EngineKind`] is the CPU's own, and knows nothing of command lines.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use softcpu::EngineKind;

/// What `--engine` takes.
pub(crate) fn parser() -> impl TypedValueParser<Value = EngineKind> {
    let values = EngineKind::ALL.map(|engine| PossibleValue::new(engine.name()).help(phrase(engine)));
    PossibleValuesParser::new(values).try_map(|name| parse(&name))
}

/// Reads the name of an engine.
pub(crate) fn parse(name: &str) -> Result<EngineKind, String> {
    let names = || EngineKind::ALL.map(EngineKind::name).join(", ");
    EngineKind::named(name).ok_or_else(|| format!("'{name}' is none of {}", names()))
}

fn phrase(engine: EngineKind) -> &'static str {
    match engine {
        EngineKind::Interpret => "Each guest instruction is executed by a function: the reference",
        EngineKind::Translate => {
            "Blocks of guest code are translated to code of the host: the same guest, faster"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_read_by_the_names_that_reports_have() {
        for engine in EngineKind::ALL {
            assert_eq!(parse(engine.name()), Ok(engine));
        }
        let error = parse("warp").unwrap_err();
        assert!(error.contains("'warp'") && error.contains("interpret, translate"), "{error}");
    }
}

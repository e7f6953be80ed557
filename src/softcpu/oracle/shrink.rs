//! Makes a scenario that differs as small as it gets: fewer runs, fewer instructions (others become NOPs), simpler states.
//! What is taken away stays away only if the two sides still differ.

use super::driver::{Differing, Failure, World};
use super::flow;
use super::guest::Engine;
use super::place::{Case, origin};
use super::scenario::{Body, Scenario};

/// A change that may make the scenario smaller.
type Change = Box<dyn Fn(&mut Scenario)>;

/// How often the list of changes is gone through.
const ROUNDS: usize = 3;

/// The smallest scenario found that still differs; the one given if it does not differ when executed again.
pub fn shrink<E: Engine>(world: &mut World<E>, scenario: Scenario) -> Result<Scenario, Failure> {
    let Some(first) = world.try_both(&scenario)? else { return Ok(scenario) };
    let mut smallest = scenario;
    for _ in 0..ROUNDS {
        let mut changed = false;
        for change in changes(&smallest) {
            let mut candidate = smallest.clone();
            change(&mut candidate);
            let smaller = candidate.runs != smallest.runs;
            if smaller && !candidate.runs.is_empty() && same(&first, world.try_both(&candidate)?.as_ref()) {
                smallest = candidate;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    Ok(smallest)
}

/// Whether it is still the difference that was found: the same exceptions, or none, on both sides.
fn same(first: &Differing, now: Option<&Differing>) -> bool {
    now.is_some_and(|now| {
        first.native.trap.vector == now.native.trap.vector && first.soft.trap.vector == now.soft.trap.vector
    })
}

fn changes(scenario: &Scenario) -> Vec<Change> {
    let mut list: Vec<Change> = Vec::new();
    for run in (0..scenario.runs.len()).rev() {
        list.push(Box::new(move |s| {
            if run < s.runs.len() {
                s.runs.remove(run);
            }
        }));
    }
    if let Body::Sequence(items) = &scenario.body {
        for &(at, len, _) in items {
            list.push(Box::new(move |s| {
                s.runs.iter_mut().for_each(|run| pad(run, at, len));
                settle(s);
            }));
        }
        list.push(Box::new(drop_padding));
    }
    let each = |change: fn(&mut Case)| -> Change { Box::new(move |s| s.runs.iter_mut().for_each(change)) };
    list.push(each(|run| run.memory.fill(0)));
    list.push(each(|run| run.fx = super::random::PLAIN_IMAGE));
    list.push(each(|run| run.ymm.fill(0)));
    list.push(each(|run| run.rflags = 0x202));
    for register in 0..16 {
        for value in [0, 1] {
            list.push(Box::new(move |s| {
                for run in s.runs.iter_mut().filter(|run| run.gprs[register] > value) {
                    run.gprs[register] = value;
                }
            }));
        }
    }
    list
}

/// Makes NOPs of an instruction.
fn pad(run: &mut Case, at: usize, len: usize) {
    if let Some(bytes) = run.code.get_mut(at..at + len) {
        bytes.fill(0x90);
    }
}

/// Finds out anew which flags may be undefined, now that some instructions are gone; what reads such a flag is no scenario.
fn settle(scenario: &mut Scenario) {
    let (bits, Body::Sequence(items)) = (scenario.bits, &mut scenario.body) else { return };
    let ip = |run: &Case| run.code_at - origin(bits);
    if !scenario.runs.iter().all(|run| flow::settle(bits, ip(run), &run.code, items)) {
        scenario.runs.clear();
    }
}

/// Drops the NOPs at the end, but one.
fn drop_padding(scenario: &mut Scenario) {
    let Body::Sequence(items) = &mut scenario.body else { return };
    let Some(first) = scenario.runs.first() else { return };
    let code = &first.code[..first.code_len];
    let same = scenario.runs.iter().all(|run| run.code == first.code);
    let used = items.iter().filter(|(at, len, _)| code[*at..at + len].iter().any(|byte| *byte != 0x90));
    let keep = used.map(|(at, len, _)| at + len).max().unwrap_or(0);
    let entered_before = scenario.runs.iter().all(|run| run.rip <= first.rip + keep as u64);
    if same && entered_before && !first.is_open() && keep + 1 < first.code_len {
        let undefined = items.iter().find(|(at, ..)| *at == keep).map_or(0, |item| item.2);
        items.retain(|(at, ..)| *at < keep);
        items.extend([(keep, 1, undefined), (keep + 1, 0, undefined)]);
        for run in &mut scenario.runs {
            run.code_len = keep + 1;
        }
        settle(scenario);
    }
}

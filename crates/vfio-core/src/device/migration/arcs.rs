//! Which way from one state to another (`drivers/vfio/vfio_main.c`, `vfio_mig_get_next_state`).

use super::{DataDirection, MigrationFlags, State};
use crate::{Errno, Result};

/// The first arc from `from` to `to` for a device with these abilities: the state it leads to.
/// `EINVAL` when there is no way, or when the device does not have one of the two.
pub(super) fn next_hop(from: State, to: State, flags: MigrationFlags) -> Result<State> {
    let has = |state: State| flags.contains(state.needs());
    if to == State::Error || !has(from) || !has(to) {
        return Err(Errno::INVAL);
    }
    let mut hop = full_next_hop(from, to)?;
    // A state the device does not have is left at once.
    while !has(hop) {
        hop = full_next_hop(hop, to)?;
    }
    Ok(hop)
}

/// The table of a device that has all states.
fn full_next_hop(from: State, to: State) -> Result<State> {
    use State::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    Ok(match (from, to) {
        (Error, _) | (_, Error) | (StopCopy, PreCopy | PreCopyP2p) => return Err(Errno::INVAL),
        (from, to) if from == to => to,
        (Stop, StopCopy | Resuming) => to,
        (Stop, _) => RunningP2p,
        (Running, PreCopy) => PreCopy,
        (Running, _) => RunningP2p,
        (StopCopy | Resuming, _) => Stop,
        (RunningP2p, Running | PreCopy) => Running,
        (RunningP2p, PreCopyP2p) => PreCopyP2p,
        (RunningP2p, _) => Stop,
        (PreCopy, StopCopy | PreCopyP2p) => PreCopyP2p,
        (PreCopy, _) => Running,
        (PreCopyP2p, StopCopy | PreCopy) => to,
        (PreCopyP2p, _) => RunningP2p,
    })
}

/// All arcs from one state to another, as the states they lead to. Empty when it is there.
pub(super) fn path(from: State, to: State, flags: MigrationFlags) -> Result<Vec<State>> {
    let mut path = Vec::new();
    let mut at = from;
    if to == State::Error {
        return Err(Errno::INVAL);
    }
    while at != to {
        at = next_hop(at, to, flags)?;
        path.push(at);
    }
    Ok(path)
}

/// The data session that a single arc opens.
pub(super) fn opens(from: State, to: State) -> Option<DataDirection> {
    match (from, to) {
        (State::Stop, State::StopCopy)
        | (State::Running, State::PreCopy)
        | (State::RunningP2p, State::PreCopyP2p) => Some(DataDirection::Saving),
        (State::Stop, State::Resuming) => Some(DataDirection::Resuming),
        _ => None,
    }
}

/// Whether a device in this state changes nothing by itself.
pub(super) fn is_stopped(state: State) -> bool {
    matches!(state, State::Stop | State::StopCopy | State::Resuming)
}

#[cfg(test)]
mod tests {
    use super::*;
    use State::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

    const STOP_COPY: MigrationFlags = MigrationFlags::STOP_COPY;
    const P2P: MigrationFlags = MigrationFlags::P2P;
    const PRE_COPY: MigrationFlags = MigrationFlags::PRE_COPY;

    /// The kernel's table, row by row; `None` is refused.
    #[test]
    fn the_kernels_table() {
        const TO: [State; 7] = [
            Stop, Running, StopCopy, Resuming, RunningP2p, PreCopy, PreCopyP2p,
        ];
        let all = STOP_COPY | P2P | PRE_COPY;
        let some = |states: [State; 7]| states.map(Some);
        for (from, row) in [
            (
                Stop,
                some([
                    Stop, RunningP2p, StopCopy, Resuming, RunningP2p, RunningP2p, RunningP2p,
                ]),
            ),
            (
                Running,
                some([
                    RunningP2p, Running, RunningP2p, RunningP2p, RunningP2p, PreCopy, RunningP2p,
                ]),
            ),
            (
                StopCopy,
                [
                    Some(Stop),
                    Some(Stop),
                    Some(StopCopy),
                    Some(Stop),
                    Some(Stop),
                    None,
                    None,
                ],
            ),
            (
                Resuming,
                some([Stop, Stop, Stop, Resuming, Stop, Stop, Stop]),
            ),
            (
                RunningP2p,
                some([Stop, Running, Stop, Stop, RunningP2p, Running, PreCopyP2p]),
            ),
            (
                PreCopy,
                some([
                    Running, Running, PreCopyP2p, Running, Running, PreCopy, PreCopyP2p,
                ]),
            ),
            (
                PreCopyP2p,
                some([
                    RunningP2p, RunningP2p, StopCopy, RunningP2p, RunningP2p, PreCopy, PreCopyP2p,
                ]),
            ),
        ] {
            for (to, want) in TO.into_iter().zip(row) {
                assert_eq!(next_hop(from, to, all).ok(), want, "{from} to {to}");
            }
            assert_eq!(next_hop(from, State::Error, all), Err(Errno::INVAL));
            assert_eq!(next_hop(State::Error, from, all), Err(Errno::INVAL));
        }
    }

    #[test]
    fn states_a_device_does_not_have_are_skipped_or_refused() {
        for flags in [STOP_COPY, STOP_COPY | P2P, STOP_COPY | PRE_COPY] {
            for from in State::ALL {
                for to in State::ALL {
                    let has = |state: State| state != State::Error && flags.contains(state.needs());
                    match path(from, to, flags) {
                        Ok(path) => {
                            assert!(from == to || has(from) && has(to));
                            assert!(path.iter().all(|state| has(*state)), "{from} to {to}");
                            assert_eq!(path.last().copied().unwrap_or(from), to);
                        }
                        Err(errno) => {
                            assert_eq!(errno, Errno::INVAL);
                            assert!(!has(from) || !has(to) || from == StopCopy, "{from} to {to}");
                        }
                    }
                }
            }
        }
        let only = |from, to| path(from, to, STOP_COPY);
        assert_eq!(only(Running, StopCopy), Ok(vec![Stop, StopCopy]));
        assert_eq!(only(StopCopy, Running), Ok(vec![Stop, Running]));
        let pre = |from, to| path(from, to, STOP_COPY | PRE_COPY);
        assert_eq!(pre(PreCopy, StopCopy), Ok(vec![StopCopy]));
        assert_eq!(pre(Resuming, PreCopy), Ok(vec![Stop, Running, PreCopy]));
    }

    /// Only the last arc of a way opens a session.
    #[test]
    fn sessions_are_opened_last() {
        for bits in [1, 3, 5, 7] {
            let flags = MigrationFlags::from_bits_retain(bits);
            for from in State::ALL {
                for to in State::ALL {
                    let Ok(path) = path(from, to, flags) else {
                        continue;
                    };
                    let mut at = from;
                    for (n, &hop) in path.iter().enumerate() {
                        assert!(
                            opens(at, hop).is_none() || n + 1 == path.len(),
                            "{from} to {to} by {path:?}"
                        );
                        at = hop;
                    }
                }
            }
        }
    }
}

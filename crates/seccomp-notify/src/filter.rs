//! Which calls are trapped: a small language, compiled to BPF.

use crate::Listener;
use crate::sys;
use rustix::io::Errno;

/// `include/uapi/linux/audit.h`: the native table of system calls, as a filter sees it.
#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;

// `struct seccomp_data` of `include/uapi/linux/seccomp.h`.
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

// `include/uapi/linux/bpf_common.h`: load a word of the data, jump if equal, jump, return.
const LOAD: u16 = 0x20;
const EQUAL: u16 = 0x15;
const JUMP: u16 = 0x05;
const RETURN: u16 = 0x06;

const RET_ALLOW: u32 = 0x7fff_0000;
const RET_USER_NOTIF: u32 = 0x7fc0_0000;

/// Which system calls are trapped.
///
/// Everything else costs what the filter costs: calls of which no kind is trapped are known to the
/// kernel as always allowed and do not run it at all (`kernel/seccomp.c`, `seccomp_cache_check_allow`,
/// Linux 5.11). The others are tested in the order in which they are named here: first what is called
/// often and seldom trapped.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    traps: Vec<Trap>,
}

/// Calls of one number; with an argument's index, only for these values of its low 32 bits.
#[derive(Clone, Debug)]
struct Trap {
    number: u32,
    argument: Option<(u32, Vec<u32>)>,
}

impl Filter {
    /// One that traps nothing.
    #[must_use]
    pub fn new() -> Filter {
        Filter::default()
    }

    /// Traps every call of one number (`libc::SYS_…`), which is named once.
    #[must_use]
    pub fn trap(mut self, number: libc::c_long) -> Filter {
        self.traps.push(Trap {
            number: call(number),
            argument: None,
        });
        self
    }

    /// Traps calls of one number whose argument `index` (from 0, at most 5) has one of these values in
    /// its low 32 bits: all there is of a descriptor, a command word of ioctl, a flags word.
    #[must_use]
    pub fn trap_argument(
        mut self,
        number: libc::c_long,
        index: u32,
        values: impl IntoIterator<Item = u32>,
    ) -> Filter {
        let values = values.into_iter().collect();
        self.traps.push(Trap {
            number: call(number),
            argument: Some((index.min(5), values)),
        });
        self
    }

    /// The program: the architecture, then the number, then arguments.
    ///
    /// Jumps reach 255 instructions at most, so each test is followed by its consequence.
    pub(crate) fn compile(&self) -> Vec<sys::Instruction> {
        let op = |code, k| sys::Instruction {
            code,
            jt: 0,
            jf: 0,
            k,
        };
        // Equal: go on with the next instruction. Otherwise skip so many.
        let unless = |k, skip| sys::Instruction {
            code: EQUAL,
            jt: 0,
            jf: skip,
            k,
        };
        let mut program = vec![
            op(LOAD, ARCH),
            sys::Instruction {
                jt: 1,
                jf: 0,
                ..unless(NATIVE, 0)
            },
            op(RETURN, RET_ALLOW),
            op(LOAD, NR),
        ];
        for Trap { number, argument } in &self.traps {
            let Some((index, values)) = argument else {
                program.extend([unless(*number, 1), op(RETURN, RET_USER_NOTIF)]);
                continue;
            };
            let mut tests = vec![op(LOAD, ARGS + 8 * index + LOW)];
            for value in values {
                tests.extend([unless(*value, 1), op(RETURN, RET_USER_NOTIF)]);
            }
            tests.push(op(RETURN, RET_ALLOW));
            // A jump of 32 bits, because there may be many values.
            program.extend([
                sys::Instruction {
                    jt: 1,
                    jf: 0,
                    ..unless(*number, 0)
                },
                op(JUMP, u32::try_from(tests.len()).unwrap_or(0)),
            ]);
            program.extend(tests);
        }
        program.push(op(RETURN, RET_ALLOW));
        program
    }

    /// Puts the filter on the calling thread, for the rest of its life: on what it executes, and on
    /// the threads and processes it starts from here on.
    ///
    /// Without `CAP_SYS_ADMIN` in its user namespace a thread must have given up new privileges before
    /// (`PR_SET_NO_NEW_PRIVS`).
    ///
    /// # Errors
    /// See [`InstallError`]. Nothing is installed then.
    pub fn install(&self) -> Result<Installed, InstallError> {
        let program = self.compile();
        let flags = sys::Flags::NEW_LISTENER | sys::Flags::WAIT_KILLABLE_RECV;
        let (listener, wait_killable) = match sys::set_filter(&program, flags) {
            Ok(listener) => (listener, true),
            // Linux before 5.19 does not know the flag.
            Err(Errno::INVAL) => (
                sys::set_filter(&program, sys::Flags::NEW_LISTENER).map_err(InstallError::from)?,
                false,
            ),
            Err(errno) => return Err(errno.into()),
        };
        Ok(Installed {
            listener: Listener::new(listener),
            wait_killable,
        })
    }
}

/// Offset of the low half of a 64-bit argument.
const LOW: u32 = if cfg!(target_endian = "little") { 0 } else { 4 };

fn call(number: libc::c_long) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// A filter that was put on the calling thread.
#[derive(Debug)]
pub struct Installed {
    /// Where the calls arrive. Close-on-exec.
    pub listener: Listener,
    /// Whether a received call can be ended by fatal signals only (Linux 5.19). Without that each
    /// signal ends it, and a caller that gets many may not get through.
    pub wait_killable: bool,
}

/// Why a filter could not be put on the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstallError {
    /// `EBUSY`: a filter that is already there has a listener, and the kernel allows one.
    HasListener,
    /// `EACCES`: neither `CAP_SYS_ADMIN` nor no_new_privs.
    NoRight,
    /// `ENOSYS` or `EINVAL`: this kernel has no user notification (Linux 5.0, `CONFIG_SECCOMP_FILTER`).
    Unsupported,
    /// Anything else, such as `ENOMEM` or `EMFILE`.
    Other(Errno),
}

impl From<Errno> for InstallError {
    fn from(errno: Errno) -> InstallError {
        match errno {
            Errno::BUSY => InstallError::HasListener,
            Errno::ACCESS => InstallError::NoRight,
            Errno::NOSYS | Errno::INVAL => InstallError::Unsupported,
            other => InstallError::Other(other),
        }
    }
}

impl std::fmt::Display for InstallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            InstallError::HasListener => {
                f.write_str("a seccomp listener supervises this process already")
            }
            InstallError::NoRight => f.write_str("neither CAP_SYS_ADMIN nor no_new_privs"),
            InstallError::Unsupported => {
                f.write_str("this kernel has no seccomp user notification")
            }
            InstallError::Other(errno) => write!(f, "seccomp filter: {errno}"),
        }
    }
}

impl std::error::Error for InstallError {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn run(program: &[sys::Instruction], arch: u32, nr: u32, args: [u64; 6]) -> u32 {
        let (mut at, mut word) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            match step.code {
                LOAD if step.k == NR => word = nr,
                LOAD if step.k == ARCH => word = arch,
                LOAD => {
                    let argument = args[((step.k - ARGS) / 8) as usize];
                    assert_eq!(step.k % 8, LOW);
                    word = argument as u32;
                }
                EQUAL => at += usize::from(if word == step.k { step.jt } else { step.jf }),
                JUMP => at += step.k as usize,
                RETURN => return step.k,
                code => panic!("{code:#x}"),
            }
        }
    }

    #[test]
    fn only_what_is_named_is_trapped() {
        let many: Vec<u32> = (0..400).map(|n| n * 2).collect();
        let program = Filter::new()
            .trap(5)
            .trap_argument(16, 1, many)
            .trap_argument(20, 0, [u32::MAX])
            .trap(300)
            .compile();
        let at = |nr, args| run(&program, NATIVE, nr, args) == RET_USER_NOTIF;
        assert!(at(5, [0; 6]) && at(300, [9; 6]));
        assert!(!at(0, [0; 6]) && !at(4, [0; 6]) && !at(301, [0; 6]));
        // The kernel takes the low half of such arguments, whatever is above it.
        assert!(at(16, [1, 798, 1, 1, 1, 1]) && at(16, [1, 0xffff_ffff_0000_0006, 1, 1, 1, 1]));
        assert!(!at(16, [798, 1, 798, 0, 0, 0]) && !at(16, [0, 800, 0, 0, 0, 0]));
        assert!(at(20, [u64::MAX; 6]) && !at(20, [0; 6]));
        // x32 has bit 30 set; i386 another table.
        assert!(!at(5 | 1 << 30, [0; 6]));
        assert_eq!(run(&program, 0x4000_0003, 5, [0; 6]), RET_ALLOW);
    }

    #[test]
    fn errnos_have_a_meaning() {
        assert_eq!(
            InstallError::from(Errno::BUSY).to_string(),
            "a seccomp listener supervises this process already"
        );
        assert_eq!(InstallError::from(Errno::INVAL), InstallError::Unsupported);
        assert_eq!(
            InstallError::from(Errno::NOMEM),
            InstallError::Other(Errno::NOMEM)
        );
    }
}

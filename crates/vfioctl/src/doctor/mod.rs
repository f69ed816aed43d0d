//! `vfioctl doctor`: what this machine can and cannot do for vfiod, found out by trying.
//!
//! What changes a process for good (namespaces, filters) or might never return (a file system of our
//! own) is tried in a process of its own, `internal-doctor`, which prints its findings as lines of
//! JSON and takes everything it made with it when it ends.

mod fuse;
mod kvm;
mod machine;
mod probe;
mod programs;

use crate::cli::Global;
use crate::fail::{Fail, Result};
use crate::print::{self, Style};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;
use vfiod_control::view::SCHEMA;

pub(crate) use probe::{Role, internal};

/// How it is with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Less than there could be; vfiod works.
    Limited,
    /// Without it vfiod does not work, or not for this user.
    Missing,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Finding {
    name: String,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    advice: Option<String>,
}

impl Finding {
    fn ok(name: &str, found: impl Into<String>) -> Finding {
        Finding {
            name: name.to_owned(),
            verdict: Verdict::Ok,
            found: found.into(),
            advice: None,
        }
    }

    fn limited(name: &str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding {
            verdict: Verdict::Limited,
            advice: Some(advice.into()),
            ..Finding::ok(name, found)
        }
    }

    fn missing(name: &str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding {
            verdict: Verdict::Missing,
            ..Finding::limited(name, found, advice)
        }
    }
}

/// What is tried in the other process, and printed in this order with the rest.
const PROBED: &[&str] = &[FUSE, PASSTHROUGH, CLIENTS, SECCOMP, MOUNTS, USER_NAMESPACES];
const FUSE: &str = "fuse";
const PASSTHROUGH: &str = "passthrough";
const CLIENTS: &str = "clients";
const SECCOMP: &str = "seccomp";
const MOUNTS: &str = "mounts";
const USER_NAMESPACES: &str = "user-namespaces";

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    schema: u32,
    source: &'a str,
    doctor: Doctor<'a>,
}

#[derive(Serialize)]
struct Doctor<'a> {
    /// Whether everything essential works.
    works: bool,
    findings: &'a [Finding],
}

/// Tries everything and prints what came of it. The exit code is 1 if something essential is
/// missing.
pub(crate) fn run(global: &Global) -> Result<ExitCode> {
    let mut findings = vec![machine::kernel()];
    findings.extend(probed()?);
    findings.extend([
        kvm::kvm(),
        machine::huge_pages(),
        machine::limits(),
        programs::mdevctl(),
        programs::qemu(),
        machine::daemon(global),
    ]);
    let works = findings
        .iter()
        .all(|finding| finding.verdict != Verdict::Missing);
    if global.json {
        let report = Report {
            schema: SCHEMA,
            source: "machine",
            doctor: Doctor {
                works,
                findings: &findings,
            },
        };
        let text = serde_json::to_string_pretty(&report)
            .map_err(|error| Fail::failed(error.to_string()))?;
        print::out(&format!("{text}\n"));
    } else {
        print::out(&lines(Style::stdout(), &findings));
    }
    Ok(if works {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// One line each: verdict, name, what was found and what to do.
fn lines(style: Style, findings: &[Finding]) -> String {
    let width = findings
        .iter()
        .map(|finding| finding.name.len())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let (word, code) = match finding.verdict {
            Verdict::Ok => ("ok     ", "32"),
            Verdict::Limited => ("limited", "33"),
            Verdict::Missing => ("MISSING", "31"),
        };
        let _ = write!(
            text,
            "{}  {:width$}  {}",
            style.paint(code, word),
            finding.name,
            finding.found
        );
        if let Some(advice) = &finding.advice {
            let _ = write!(text, "; {advice}");
        }
        text.push('\n');
    }
    text
}

/// The findings of the other processes, each thing once, in the order of [`PROBED`].
fn probed() -> Result<Vec<Finding>> {
    let own = |as_user: bool| -> Result<(Vec<Finding>, String)> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("internal-doctor");
        if as_user {
            command.arg("--as-user");
        }
        let output = programs::output(&mut command, PROBE_LIMIT)
            .map_err(|error| Fail::failed(format!("trying things out: {error}")))?;
        let findings = output
            .out
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        Ok((findings, output.how()))
    };
    let (mut found, ended) = own(false)?;
    if rustix::process::geteuid().is_root() {
        found.extend(own(true)?.0);
    }
    Ok(PROBED
        .iter()
        .map(|name| {
            let one = found.iter().position(|finding| finding.name == **name);
            one.map_or_else(
                || {
                    Finding::missing(
                        name,
                        format!("the attempt came to no result: it {ended}"),
                        "see the kernel's log",
                    )
                },
                |at| found.swap_remove(at),
            )
        })
        .collect())
}

/// A try that takes longer hangs.
const PROBE_LIMIT: Duration = Duration::from_secs(20);

/// A program whose output nobody reads.
fn quiet(command: &mut Command) -> &mut Command {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_verdict_name_finding_and_advice() {
        let findings = [
            Finding::ok("kernel", "Linux 6.18"),
            Finding::missing("fuse", "there is no /dev/fuse", "modprobe fuse"),
        ];
        assert_eq!(
            lines(Style { colour: false }, &findings),
            "ok       kernel  Linux 6.18\n\
             MISSING  fuse    there is no /dev/fuse; modprobe fuse\n"
        );
    }

    #[test]
    fn findings_survive_the_way_from_the_other_process() {
        let one = Finding::limited("kvm", "no", "yes");
        let text = serde_json::to_string(&one).unwrap();
        assert_eq!(serde_json::from_str::<Finding>(&text).unwrap(), one);
    }
}

//! `cargo xtask test`: which suites there are, and how each is run, timed and counted.

use std::collections::BTreeSet;
use std::fs;
use std::io::BufRead as _;
use std::io::BufReader;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;

use crate::packages;
use crate::workspace;
use crate::workspace::Workspace;

/// A suite that takes longer than this is stopped and counts as failed.
const SUITE_LIMIT: Duration = Duration::from_secs(15 * 60);

/// The package of the end-to-end tests.
const END_TO_END: &str = "vfiod-tests";

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run only this suite (may be given more than once); see --list
    #[arg(long, value_name = "NAME")]
    suite: Vec<String>,
    /// Print the names of the suites and stop
    #[arg(long)]
    list: bool,
    /// Run only tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// What a suite runs.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// Unit tests and integration tests of every crate but the end-to-end one.
    Unit,
    /// Examples in the documentation.
    Doc,
    /// The life cycle's threads under many schedules.
    Schedules,
    /// What the end-to-end tests are made with.
    Harness,
    /// One file of `tests/tests`.
    EndToEnd,
}

#[derive(Debug, Clone)]
struct Suite {
    name: String,
    kind: Kind,
}

/// What came of a suite.
#[derive(Debug, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
    failures: Vec<String>,
}

/// A test that said it could not run here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Skip {
    test: String,
    reason: String,
}

/// Runs the suites and prints what came of them. True if nothing failed and, in continuous
/// integration, nothing was skipped but for an allowed reason.
///
/// # Errors
/// What the tests need is missing, or does not build.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<bool> {
    let all = suites(&workspace.root)?;
    if options.list {
        for suite in &all {
            println!("{}", suite.name);
        }
        return Ok(true);
    }
    let chosen = choose(&all, &options.suite)?;
    let begin = Instant::now();
    if chosen.iter().any(|suite| suite.kind == Kind::EndToEnd) {
        prepare(workspace)?;
        build(workspace)?;
    }
    let log = workspace.target.join("skipped.log");
    let mut total = Count::default();
    let mut all_skips = Vec::new();
    let mut summaries = Vec::new();
    for suite in chosen {
        workspace::write(&log, "")?;
        println!("\nSUITE {}", suite.name);
        let begin = Instant::now();
        let count = run_suite(workspace, suite, options.only.as_deref(), &log)?;
        let skips = parse_skips(&workspace::read(&log)?);
        let summary = summary(&suite.name, &count, &skips, begin.elapsed());
        println!("{summary}");
        summaries.push(summary);
        // libtest counts a test that returns early as passed; it is a skip.
        total.passed += count.passed.saturating_sub(skips.len());
        total.failed += count.failed;
        total.failures.extend(
            count
                .failures
                .iter()
                .map(|test| format!("{}: {test}", suite.name)),
        );
        all_skips.extend(skips);
    }
    let allowed = allowed_reasons(&workspace.root)?;
    let forbidden = report(&summaries, &total, &all_skips, &allowed, begin.elapsed());
    if workspace::is_ci() && forbidden > 0 {
        println!(
            "{forbidden} tests were skipped for a reason that is not on the allowed list: they count as failed"
        );
        total.failed += forbidden;
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(total.failed == 0)
}

/// Installs and fetches what the end-to-end tests need.
///
/// # Errors
/// As [`packages::host::ensure`] and [`packages::private::ensure`].
pub(crate) fn prepare(workspace: &Workspace) -> Result<()> {
    let begin = Instant::now();
    packages::host::ensure()?;
    packages::private::ensure(&workspace.private())?;
    println!("packages: ready in {:.1} s", begin.elapsed().as_secs_f64());
    Ok(())
}

/// Builds the programs that the end-to-end tests start.
fn build(workspace: &Workspace) -> Result<()> {
    let begin = Instant::now();
    workspace::run(
        Command::new(workspace::cargo())
            .args(["build", "--quiet", "--workspace", "--bins"])
            .current_dir(&workspace.root),
    )?;
    println!("programs: built in {:.1} s", begin.elapsed().as_secs_f64());
    Ok(())
}

/// All suites: units, documentation, and one for each file of end-to-end tests.
fn suites(root: &Path) -> Result<Vec<Suite>> {
    let mut suites = [
        ("unit", Kind::Unit),
        ("doc", Kind::Doc),
        ("schedules", Kind::Schedules),
        ("harness", Kind::Harness),
    ]
    .map(|(name, kind)| Suite {
        name: name.to_owned(),
        kind,
    })
    .to_vec();
    let mut names = BTreeSet::new();
    let dir = root.join("tests/tests");
    for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
        let path: PathBuf = entry
            .with_context(|| format!("reading {}", dir.display()))?
            .path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(
                path.file_stem()
                    .map(|name| name.to_string_lossy().into_owned()),
            );
        }
    }
    suites.extend(names.into_iter().map(|name| Suite {
        name,
        kind: Kind::EndToEnd,
    }));
    Ok(suites)
}

fn choose<'a>(all: &'a [Suite], names: &[String]) -> Result<Vec<&'a Suite>> {
    for name in names {
        if !all.iter().any(|suite| suite.name == *name) {
            let known: Vec<&str> = all.iter().map(|suite| suite.name.as_str()).collect();
            bail!("there is no suite {name}; there are: {}", known.join(", "));
        }
    }
    Ok(all
        .iter()
        .filter(|suite| names.is_empty() || names.contains(&suite.name))
        .collect())
}

/// Runs one suite, passing its output on, and counts its tests.
fn run_suite(
    workspace: &Workspace,
    suite: &Suite,
    only: Option<&str>,
    log: &Path,
) -> Result<Count> {
    let mut command = Command::new(workspace::cargo());
    command
        .args(["test", "--no-fail-fast"])
        .current_dir(&workspace.root);
    match suite.kind {
        Kind::Unit => command.args([
            "--workspace",
            "--exclude",
            END_TO_END,
            "--lib",
            "--bins",
            "--tests",
        ]),
        Kind::Doc => command.args(["--workspace", "--doc"]),
        Kind::Schedules => command.args([
            "--package",
            "vfio-core",
            "--features",
            "shuttle",
            "--lib",
            "explored",
        ]),
        Kind::Harness => command.args(["--package", END_TO_END, "--lib"]),
        Kind::EndToEnd => command.args(["--package", END_TO_END, "--test", &suite.name]),
    };
    command.arg("--").args(only);
    if suite.kind == Kind::EndToEnd {
        // They mount, start daemons and share a machine of two processors.
        command.arg("--test-threads=1");
    }
    command
        .env("VFIOD_BIN_DIR", workspace.target.join("debug"))
        .env("VFIOD_PRIVATE_DIR", workspace.private())
        .env("VFIOD_SKIP_LOG", log)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0);
    let mut child = command
        .spawn()
        .with_context(|| format!("running `{}`", workspace::shown(&command)))?;
    let stdout = child
        .stdout
        .take()
        .context("the output of cargo is a pipe")?;
    let (lines, incoming) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if lines
                .send(String::from_utf8_lossy(&line).into_owned())
                .is_err()
            {
                break;
            }
        }
    });
    let deadline = Instant::now() + SUITE_LIMIT;
    let mut count = Count::default();
    loop {
        match incoming.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                println!("{line}");
                count.line(&line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                kill_tree(&mut child);
                count.failed += 1;
                count
                    .failures
                    .push(format!("stopped after {} s", SUITE_LIMIT.as_secs()));
                break;
            }
        }
    }
    let status = child.wait().context("waiting for cargo")?;
    if !status.success() && count.failed == 0 {
        // It did not build, or a test program died without a result.
        count.failed = 1;
        count.failures.push(format!(
            "cargo test ended with {status} without naming a failed test"
        ));
    }
    Ok(count)
}

/// Kills a child and all that it started, wherever they put themselves: test programs start
/// daemons and guests in process groups of their own.
fn kill_tree(child: &mut Child) {
    let mut pids = vec![child.id()];
    let mut next = 0;
    while let Some(pid) = pids.get(next).copied() {
        next += 1;
        let children = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        for line in children {
            pids.extend(
                line.split_whitespace()
                    .filter_map(|word| word.parse::<u32>().ok()),
            );
        }
    }
    for pid in pids {
        let pid = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            // One that ended in between is no longer there, which is what we want.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

impl Count {
    /// Takes one line of libtest's output.
    fn line(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            let numbers = result.split_once(". ").map_or("", |(_, numbers)| numbers);
            for part in numbers.split("; ") {
                match part.split_once(' ') {
                    Some((number, "passed")) => self.passed += number.parse().unwrap_or(0),
                    Some((number, "failed")) => self.failed += number.parse().unwrap_or(0),
                    _ => {}
                }
            }
        } else if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
    }
}

/// Reads the log that `vfiod_tests::skip` writes: lines of `test<TAB>reason`.
fn parse_skips(text: &str) -> Vec<Skip> {
    text.lines()
        .filter_map(|line| line.split_once('\t'))
        .map(|(test, reason)| Skip {
            test: test.to_owned(),
            reason: reason.to_owned(),
        })
        .collect()
}

/// The reasons for which a test may be skipped in continuous integration.
fn allowed_reasons(root: &Path) -> Result<Vec<String>> {
    let text = workspace::read(&root.join("tests/assets/allowed-skips.txt"))?;
    Ok(text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect())
}

fn summary(name: &str, count: &Count, skips: &[Skip], time: Duration) -> String {
    let reasons: BTreeSet<&str> = skips.iter().map(|skip| skip.reason.as_str()).collect();
    let reasons = if reasons.is_empty() {
        String::new()
    } else {
        format!(" ({})", reasons.into_iter().collect::<Vec<_>>().join("; "))
    };
    format!(
        "SUITE {name}: {} passed, {} failed, {} skipped{reasons} in {:.1} s",
        count.passed.saturating_sub(skips.len()),
        count.failed,
        skips.len(),
        time.as_secs_f64()
    )
}

/// Prints the summaries, then what failed and what was skipped, one by one. Returns how many skips
/// have a reason that is not allowed.
fn report(
    summaries: &[String],
    total: &Count,
    skips: &[Skip],
    allowed: &[String],
    time: Duration,
) -> usize {
    println!("\n{}", summaries.join("\n"));
    for failure in &total.failures {
        println!("FAILED {failure}");
    }
    let mut forbidden = 0;
    for skip in skips {
        let is_allowed = allowed.contains(&skip.reason);
        forbidden += usize::from(!is_allowed);
        let note = if is_allowed {
            ""
        } else {
            " (NOT ALLOWED in continuous integration)"
        };
        println!("SKIPPED {}: {}{note}", skip.test, skip.reason);
    }
    println!(
        "{} skipped, all in {:.1} s",
        skips.len(),
        time.as_secs_f64()
    );
    forbidden
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtest_output_is_counted() {
        let mut count = Count::default();
        for line in [
            "running 3 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: ok. 40 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ] {
            count.line(line);
        }
        assert_eq!(
            count,
            Count {
                passed: 42,
                failed: 1,
                failures: vec!["a::c".to_owned()]
            }
        );
    }

    #[test]
    fn skips_are_not_passes() {
        let skips = parse_skips("maps\tno passthrough\nbroken line\nfaults\tno passthrough\n");
        assert_eq!(skips.len(), 2);
        let count = Count {
            passed: 5,
            ..Count::default()
        };
        assert_eq!(
            summary("mdpy", &count, &skips, Duration::from_millis(1500)),
            "SUITE mdpy: 3 passed, 0 failed, 2 skipped (no passthrough) in 1.5 s"
        );
    }

    #[test]
    fn only_reasons_on_the_list_are_allowed() {
        let skips = parse_skips("a\tlisted\nb\tnot listed\n");
        let count = Count::default();
        assert_eq!(
            report(&[], &count, &skips, &["listed".to_owned()], Duration::ZERO),
            1
        );
    }

    #[test]
    fn what_a_suite_leaves_in_another_group_is_killed_with_it() {
        let mut child = Command::new("sh")
            .args(["-c", "setsid sleep 1000 & echo $!; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("there is a shell");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("the output is a pipe");
        let mut stdout = BufReader::new(stdout);
        stdout
            .read_line(&mut line)
            .expect("the shell tells the number");
        kill_tree(&mut child);
        child.wait().expect("it ends");
        // The sleeper holds the other end of the pipe: it ends only when the sleeper is gone.
        assert_eq!(stdout.read_line(&mut line).expect("the pipe ends"), 0);
    }

    #[test]
    fn an_unknown_suite_is_named_with_those_there_are() {
        let all = [Suite {
            name: "unit".to_owned(),
            kind: Kind::Unit,
        }];
        let error = choose(&all, &["nuit".to_owned()]).expect_err("there is no such suite");
        assert_eq!(error.to_string(), "there is no suite nuit; there are: unit");
        assert_eq!(choose(&all, &[]).expect("all of them").len(), 1);
    }
}

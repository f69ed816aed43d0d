//! `cargo xtask check`: the rules of the architecture that no compiler knows.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use serde_json::Value;

use crate::docs;
use crate::workspace;
use crate::workspace::Workspace;

/// Dependencies that must not exist, directly or through others, and why not. Development
/// dependencies are free: a transport's tests may serve a real driver.
const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    (
        "vfio-drivers",
        &["vfio-fuse", "fuse-server", "vfio-user"],
        "a driver must not know whether a file or a socket reached it",
    ),
    (
        "vfio-fuse",
        &["vfio-drivers"],
        "a transport serves every driver alike",
    ),
    (
        "vfio-user",
        &["vfio-drivers", "vfio-fuse", "fuse-server"],
        "a transport serves every driver alike, and knows no other transport",
    ),
    (
        "fuse-server",
        &["vfio-drivers"],
        "a transport serves every driver alike",
    ),
    (
        "vfio-core",
        &[
            "vfio-drivers",
            "vfio-fuse",
            "fuse-server",
            "vfio-user",
            "vfiod-control",
        ],
        "the core is below drivers and transports",
    ),
    (
        "fuse-server",
        &["vfio-core", "vfio-uapi"],
        "the FUSE protocol server is of use without VFIO",
    ),
    (
        "seccomp-notify",
        &["vfio-core", "vfio-uapi", "client-process", "vfiod-control"],
        "supervising system calls is of use without VFIO",
    ),
    (
        "dma-memory",
        &["vfio-core"],
        "client memory is below the core",
    ),
    (
        "client-process",
        &["vfio-core"],
        "client processes are below the core",
    ),
    (
        "vfio-uapi",
        &["vfio-core", "dma-memory", "client-process"],
        "the ABI is below everything",
    ),
    (
        "vfiod-control",
        &["vfio-core"],
        "messages are types, not behaviour",
    ),
    (
        "vfioctl",
        &["vfio-core", "vfio-drivers"],
        "the command line speaks to a daemon or to sysfs, it has no devices",
    ),
];

/// Longer files are listed: each should have one reason to change.
const LONG: usize = 600;

/// Starts of paths that exist on somebody's machine only. Split so that this file passes.
const MACHINE_PATHS: &[&str] = &[
    concat!("/ho", "me/"),
    concat!("/Us", "ers/"),
    concat!("/wo", "rk/"),
    concat!("/tm", "p/wt"),
];

/// Checks every rule, prints what breaks one, and what is only worth a look. True if all is well.
///
/// # Errors
/// Something could not be read.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let mut problems = arrows(&workspace.metadata)?;
    let mut long = Vec::new();
    let files = files(workspace)?;
    for (name, text) in &files {
        problems.extend(machine_paths(name, text));
        if name.ends_with(".rs") {
            problems.extend(unsafe_reasons(name, text));
            let lines = code_lines(text);
            if lines > LONG && !is_test(name) {
                long.push(format!("{name}: {lines} lines of code"));
            }
        }
    }
    problems.extend(docs::problems(&files));
    problems.extend(lints(workspace)?);
    for file in &long {
        println!("long: {file} (a file should have at most {LONG} without its tests)");
    }
    for problem in &problems {
        println!("problem: {problem}");
    }
    println!(
        "check: {} problems, {} long files",
        problems.len(),
        long.len()
    );
    Ok(problems.is_empty())
}

/// Forbidden dependencies among the packages of the workspace.
fn arrows(metadata: &Value) -> Result<Vec<String>> {
    let packages = metadata
        .get("packages")
        .and_then(Value::as_array)
        .context("cargo metadata lists no packages")?;
    let mut edges: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        let name = package
            .get("name")
            .and_then(Value::as_str)
            .context("a package has no name")?;
        let dependencies = package
            .get("dependencies")
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        edges.entry(name).or_default().extend(
            dependencies
                .filter(|dependency| dependency.get("kind").and_then(Value::as_str) != Some("dev"))
                .filter_map(|dependency| dependency.get("name").and_then(Value::as_str)),
        );
    }
    let mut problems = Vec::new();
    for (from, targets, why) in FORBIDDEN {
        let reached = reachable(&edges, from);
        for target in targets.iter().filter(|target| reached.contains(**target)) {
            problems.push(format!("{from} depends on {target}: {why}"));
        }
    }
    Ok(problems)
}

/// All packages that `from` is built with.
fn reachable<'a>(edges: &BTreeMap<&'a str, Vec<&'a str>>, from: &str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut next: Vec<&str> = edges.get(from).cloned().unwrap_or_default();
    while let Some(name) = next.pop() {
        if reached.insert(name) {
            next.extend(edges.get(name).into_iter().flatten());
        }
    }
    reached
}

/// The files that git knows, and new ones that it does not ignore, by path. Those that are no text
/// are empty.
fn files(workspace: &Workspace) -> Result<BTreeMap<String, String>> {
    let list = workspace::output(
        Command::new("git")
            // A checkout that another user owns is read all the same.
            .args([
                "-c",
                "safe.directory=*",
                "ls-files",
                "--cached",
                "--others",
                "--exclude-standard",
            ])
            .current_dir(&workspace.root),
    )?;
    let mut files = BTreeMap::new();
    for name in list.lines() {
        let path = workspace.root.join(name);
        // Deleted but not yet committed: it is there no more.
        if path.symlink_metadata().is_ok() {
            files.insert(
                name.to_owned(),
                std::fs::read_to_string(path).unwrap_or_default(),
            );
        }
    }
    Ok(files)
}

/// True for files that hold nothing but tests.
fn is_test(name: &str) -> bool {
    name.ends_with("/tests.rs") || name.contains("/tests/")
}

/// Lines before the unit tests.
fn code_lines(text: &str) -> usize {
    let mut lines = 0;
    let mut rest = text.lines().peekable();
    while let Some(line) = rest.next() {
        let is_test = line == "#[cfg(test)]"
            && rest
                .peek()
                .is_some_and(|next| next.starts_with("mod tests"));
        if is_test {
            break;
        }
        lines += 1;
    }
    lines
}

fn machine_paths(name: &str, text: &str) -> Vec<String> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| MACHINE_PATHS.iter().any(|path| line.contains(path)))
        .map(|(number, line)| {
            format!(
                "{name}:{}: a path of somebody's machine: {}",
                number + 1,
                line.trim()
            )
        })
        .collect()
}

/// Every attribute that lets unsafe code in has a reason.
fn unsafe_reasons(name: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    for open in [
        concat!("#![ex", "pect("),
        concat!("#[ex", "pect("),
        concat!("#![al", "low("),
        concat!("#[al", "low("),
    ] {
        for (at, _) in text.match_indices(open) {
            let attribute = text
                .get(at..)
                .unwrap_or_default()
                .split(")]")
                .next()
                .unwrap_or_default();
            if attribute.contains("unsafe_code") && !attribute.contains("reason") {
                let line = text.get(..at).unwrap_or_default().lines().count() + 1;
                problems.push(format!(
                    "{name}:{line}: unsafe code is let in without a reason"
                ));
            }
        }
    }
    problems
}

/// Every package takes the lints of the workspace, in which unsafe code is denied.
fn lints(workspace: &Workspace) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let root = workspace::read(&workspace.root.join("Cargo.toml"))?;
    if !root
        .lines()
        .any(|line| line.trim() == r#"unsafe_code = "deny""#)
    {
        problems.push("Cargo.toml: the workspace does not deny unsafe code".to_owned());
    }
    let packages = workspace
        .metadata
        .get("packages")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    for path in packages.filter_map(|package| package.get("manifest_path").and_then(Value::as_str))
    {
        let text = workspace::read(path.as_ref())?;
        let inherits = text
            .split("[lints]")
            .nth(1)
            .is_some_and(|section| section.trim_start().starts_with("workspace = true"));
        if !inherits {
            problems.push(format!("{path}: does not take the lints of the workspace"));
        }
    }
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn metadata(edges: &[(&str, &str, Option<&str>)]) -> Value {
        let packages: Vec<Value> = edges
            .iter()
            .map(|(from, to, kind)| json!({"name": from, "dependencies": [{"name": to, "kind": kind}]}))
            .collect();
        json!({ "packages": packages })
    }

    #[test]
    fn a_forbidden_arrow_is_found_through_others() {
        let edges = [
            ("vfio-drivers", "helper", None),
            ("helper", "fuse-server", None),
        ];
        let problems = arrows(&metadata(&edges)).expect("the metadata is whole");
        assert_eq!(
            problems,
            [
                "vfio-drivers depends on fuse-server: a driver must not know whether a file or a socket reached it"
            ]
        );
        let edges = [
            ("vfio-fuse", "vfio-drivers", Some("dev")),
            ("vfio-drivers", "vfio-core", None),
        ];
        assert!(
            arrows(&metadata(&edges))
                .expect("the metadata is whole")
                .is_empty()
        );
    }

    #[test]
    fn tests_do_not_make_a_file_long() {
        assert_eq!(code_lines("a\nb\n#[cfg(test)]\nmod tests {\n}\n"), 2);
        assert_eq!(code_lines("a\n#[cfg(test)]\nuse b;\nc\n"), 4);
    }

    #[test]
    fn paths_of_machines_are_found() {
        let text = format!("fine\nlet x = \"{}me/someone\";\n", "/ho");
        assert_eq!(machine_paths("f.rs", &text).len(), 1);
        assert!(machine_paths("f.rs", "/sys/class /run/vfiod").is_empty());
    }

    #[test]
    fn unsafe_needs_a_reason() {
        let open = "#![expect(";
        assert_eq!(
            unsafe_reasons("f.rs", &format!("//! Doc.\n{open}unsafe_code)]\n")).len(),
            1
        );
        let with = format!("{open}\n    unsafe_code,\n    reason = \"raw mappings\"\n)]\n");
        assert!(unsafe_reasons("f.rs", &with).is_empty());
    }
}

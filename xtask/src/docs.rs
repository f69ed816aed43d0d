//! What the documents name must be there: files, directories, modules, types and tests.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

/// Documents that speak of the tree as it is. A change log speaks of what it was.
fn is_checked(name: &str) -> bool {
    let is_at_the_top = !name.contains('/');
    name.ends_with(".md")
        && name != "CHANGELOG.md"
        && (is_at_the_top || name.starts_with("docs/") || name.starts_with("share/"))
}

/// Types of others that the documents name.
const STRANGERS: &[&str] = &["Arc"];

/// What the documents of `files` (text by path) name and is not there, one line each.
pub(crate) fn problems(files: &BTreeMap<String, String>) -> Vec<String> {
    let index = Index::of(files);
    let mut problems = Vec::new();
    for (name, text) in files.iter().filter(|(name, _)| is_checked(name)) {
        let mut table = Table::default();
        let mut is_code = false;
        for (number, line) in text.lines().enumerate() {
            if line.trim_start().starts_with("```") {
                is_code = !is_code;
            }
            if is_code {
                continue;
            }
            let mut missing: Vec<String> = links(line)
                .filter(|link| !index.has_path(&beside(name, link)))
                .map(str::to_owned)
                .collect();
            for (place, cell) in table.cells(line) {
                let cell = match place {
                    Place::Part => without_remarks(cell),
                    _ => cell.to_owned(),
                };
                let missed = spans(&cell).filter(|span| !index.has(span, place, &table.row));
                missing.extend(missed.map(str::to_owned));
            }
            let at = number + 1;
            problems.extend(
                missing
                    .iter()
                    .map(|what| format!("{name}:{at}: `{what}` is not there")),
            );
        }
    }
    problems.extend(unmapped(files));
    problems
}

/// Crates that the code map of ARCHITECTURE.md leaves out.
fn unmapped(files: &BTreeMap<String, String>) -> Vec<String> {
    let Some(text) = files.get("ARCHITECTURE.md") else {
        return Vec::new();
    };
    let named: BTreeSet<&str> = text.lines().flat_map(spans).collect();
    files
        .keys()
        .filter_map(|name| name.strip_suffix("/Cargo.toml"))
        .filter(|krate| !named.contains(krate))
        .map(|krate| format!("ARCHITECTURE.md: `{krate}` is not in the code map"))
        .collect()
}

/// Where a name stands, which says what a bare word is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In running text: a bare word can be anything.
    Text,
    /// Under `Kept in`: a word that ends in `/` is a directory.
    Kept,
    /// Under `Test`: a word of several is a test.
    Test,
    /// Beside crates in a table of paths: all words are parts of one of them.
    Part,
}

/// The table that the current line may be in.
#[derive(Debug, Default)]
struct Table {
    header: Vec<String>,
    /// The crates in the first cell, in a table of paths.
    row: Vec<String>,
}

impl Table {
    /// The cells of a line with their places; a line outside a table is one cell.
    fn cells<'a>(&mut self, line: &'a str) -> Vec<(Place, &'a str)> {
        let Some(row) = line.trim().strip_prefix('|') else {
            *self = Table::default();
            return vec![(Place::Text, line)];
        };
        let cells: Vec<&str> = row
            .trim_end_matches('|')
            .split('|')
            .map(str::trim)
            .collect();
        if self.header.is_empty() {
            self.header = cells.iter().map(|&cell| cell.to_owned()).collect();
        }
        let is_of_paths = self.header.first().is_some_and(|first| first == "Path");
        self.row = cells
            .first()
            .filter(|_| is_of_paths)
            .into_iter()
            .flat_map(|first| spans(first))
            .filter(|path| path.starts_with("crates/"))
            .map(str::to_owned)
            .collect();
        let titles = self.header.iter().map(String::as_str);
        titles
            .zip(cells)
            .enumerate()
            .map(|(column, (title, cell))| {
                let place = match title {
                    "Kept in" => Place::Kept,
                    "Test" => Place::Test,
                    _ if column > 0 && !self.row.is_empty() => Place::Part,
                    _ => Place::Text,
                };
                (place, cell)
            })
            .collect()
    }
}

/// The code map says in brackets what a module is about, in words of its own.
fn without_remarks(cell: &str) -> String {
    let mut depth = 0_usize;
    let outside = |c: &char| {
        match c {
            '(' => depth += 1,
            ')' => {
                depth = depth.saturating_sub(1);
                return false;
            }
            _ => {}
        }
        depth == 0
    };
    cell.chars().filter(outside).collect()
}

/// The code spans of a line.
fn spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Where a line's links lead, but for those to other sites.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', '#']).next())
        .filter(|link| !link.is_empty() && !link.contains("://"))
}

/// A path that the document `name` gives, from the root of the tree.
fn beside(name: &str, link: &str) -> String {
    let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
    let mut parts: Vec<&str> = Vec::new();
    for part in dir.split('/').chain(link.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// What there is to be named.
#[derive(Debug)]
struct Index<'a> {
    /// Files and the directories they are in.
    paths: BTreeSet<&'a str>,
    /// `device::tests::the_whole_life_in_order`: where each test is within its crate.
    tests: BTreeSet<String>,
    /// The source, for what is looked for by its text.
    rust: Vec<(&'a str, &'a str)>,
}

impl<'a> Index<'a> {
    fn of(files: &'a BTreeMap<String, String>) -> Index<'a> {
        let mut paths = BTreeSet::new();
        for name in files.keys() {
            let mut path = name.as_str();
            while paths.insert(path)
                && let Some((dir, _)) = path.rsplit_once('/')
            {
                path = dir;
            }
        }
        let rust: Vec<(&str, &str)> = files
            .iter()
            .filter(|(name, _)| name.ends_with(".rs"))
            .map(|(name, text)| (name.as_str(), text.as_str()))
            .collect();
        let tests = rust
            .iter()
            .flat_map(|(name, text)| tests(name, text))
            .collect();
        Index { paths, tests, rust }
    }

    fn has_path(&self, path: &str) -> bool {
        self.paths.contains(path)
    }

    /// True for what is there, and for what is no name of ours.
    fn has(&self, span: &str, place: Place, crates: &[String]) -> bool {
        let is_word = |text: &str| {
            !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        if span.contains(char::is_whitespace) || span.starts_with('/') || is_absolute(span) {
            return true;
        }
        if let Some((file, test)) = span.split_once(".rs::") {
            let file = format!("{file}.rs");
            return self
                .rust
                .iter()
                .filter(|(name, _)| ends_with_path(name, &file))
                .any(|(name, text)| {
                    let mut own = tests(name, text).into_iter();
                    own.any(|path| test == "*" || path.rsplit("::").next() == Some(test))
                });
        }
        if place == Place::Part {
            let part = span.trim_end_matches('/');
            let is_part = |path: &&str| {
                let module = path.strip_suffix(".rs").unwrap_or(path);
                crates
                    .iter()
                    .any(|krate| path.starts_with(&format!("{krate}/src/")))
                    && ends_with_path(module, part)
            };
            return self.paths.iter().any(is_part);
        }
        let starts_here = span
            .split_once('/')
            .is_some_and(|(top, _)| self.has_path(top) && self.is_dir(top));
        if starts_here && !span.ends_with("/*") {
            // What a run leaves in a directory that git does not know is not here.
            return self.has_path(span.trim_end_matches('/'));
        }
        if span.ends_with(".rs") {
            return self.paths.iter().any(|path| ends_with_path(path, span));
        }
        if let Some(dir) = span.strip_suffix("/*").or_else(|| {
            (place == Place::Kept)
                .then(|| span.strip_suffix('/'))
                .flatten()
        }) {
            return self.paths.iter().any(|path| ends_with_path(path, dir));
        }
        let name = span.split(['(', '<']).next().unwrap_or_default();
        if name.chars().next().is_some_and(char::is_uppercase)
            && name.contains(char::is_lowercase)
            && name.split("::").all(is_word)
        {
            return self.has_type(name);
        }
        let path = name.strip_suffix("::*").unwrap_or(name);
        let is_path = path.split("::").all(is_word);
        let last = path.rsplit("::").next().unwrap_or_default();
        if name.contains("::") && is_path {
            return if last.starts_with(char::is_uppercase) {
                self.has_type(last)
            } else {
                self.has_test(name) || self.has_item(last)
            };
        }
        place != Place::Test || !is_path || !name.contains('_') || self.has_test(name)
    }

    fn is_dir(&self, path: &str) -> bool {
        let inside = format!("{path}/");
        self.paths.iter().any(|other| other.starts_with(&inside))
    }

    /// `Type`, or `Type::of_it` when something of the name stands in a file with the type.
    fn has_type(&self, name: &str) -> bool {
        let (ty, part) = match name.split_once("::") {
            Some((ty, part)) => (ty, Some(part)),
            None => (name, None),
        };
        STRANGERS.contains(&ty)
            || ["struct", "enum", "trait", "type"].iter().any(|kind| {
                self.rust.iter().any(|(_, text)| {
                    declares(text, &format!("{kind} {ty}"))
                        && part.is_none_or(|part| {
                            self.has_item(part) || declares(text, &format!("pub {part}"))
                        })
                })
            })
    }

    /// A function or a macro of this name.
    fn has_item(&self, name: &str) -> bool {
        self.rust.iter().any(|(_, text)| {
            declares(text, &format!("fn {name}")) || declares(text, &format!("pub {name}"))
        })
    }

    /// `device::tests::name` by the end of its path, or `device::tests::*` by a part of it.
    fn has_test(&self, name: &str) -> bool {
        self.tests.iter().any(|test| match name.strip_suffix('*') {
            Some(start) => format!("::{test}").contains(&format!("::{start}")),
            None => format!("::{test}").ends_with(&format!("::{name}")),
        })
    }
}

/// Paths of a running system, of which `dev` and `sys` trees are made.
fn is_absolute(span: &str) -> bool {
    span.starts_with(['…', '-', '$', '['])
}

/// True if `path` is `end`, or ends with it below some directory.
fn ends_with_path(path: &str, end: &str) -> bool {
    path.strip_suffix(end)
        .is_some_and(|before| before.is_empty() || before.ends_with('/'))
}

/// True if `what` stands in the text with no more letters behind it.
fn declares(text: &str, what: &str) -> bool {
    text.match_indices(what).any(|(at, _)| {
        let rest = text.get(at + what.len()..).unwrap_or_default();
        !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_')
    })
}

/// The tests of a file, each with the modules it is in.
fn tests(name: &str, text: &str) -> Vec<String> {
    let mut parts: Vec<&str> = name.trim_end_matches(".rs").split('/').collect();
    let root = if name.starts_with("crates/") { 3 } else { 2 };
    parts.drain(..root.min(parts.len()));
    if parts
        .last()
        .is_some_and(|last| matches!(*last, "mod" | "lib" | "main"))
    {
        parts.pop();
    }
    let mut inside: Vec<(usize, &str)> = Vec::new();
    let mut found = Vec::new();
    let mut is_test = false;
    for line in text.lines() {
        let code = line.trim_start();
        let depth = line.len() - code.len();
        if code == "}" {
            inside.retain(|(at, _)| *at < depth);
        }
        if let Some(module) = code
            .strip_prefix("mod ")
            .or_else(|| code.split_once(") mod ").map(|(_, rest)| rest))
            .and_then(|rest| rest.strip_suffix(" {"))
        {
            inside.push((depth, module));
        }
        if code == "#[test]" {
            is_test = true;
        } else if is_test && let Some(rest) = code.strip_prefix("fn ") {
            is_test = false;
            let name = rest.split('(').next().unwrap_or_default();
            let modules = parts.iter().copied();
            let path: Vec<&str> = modules
                .chain(inside.iter().map(|(_, module)| *module))
                .chain([name])
                .collect();
            found.push(path.join("::"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree with one document of this text.
    fn with(text: &str) -> Vec<String> {
        let files = [
            ("docs/life.md", text),
            (
                "crates/core/src/device/mod.rs",
                "pub struct Device;\nimpl Device {\n    pub fn users(&self) {}\n}\n",
            ),
            (
                "crates/core/src/device/tests.rs",
                "#[test]\nfn it_lives() {}\nmod random {\n    #[test]\n    fn any_order() {}\n}\n",
            ),
            ("crates/core/tests/misuse/twice.rs", "fn main() {}\n"),
        ];
        problems(
            &files
                .map(|(name, text)| (name.to_owned(), text.to_owned()))
                .into(),
        )
    }

    #[test]
    fn what_is_there_may_be_named() {
        let text = "See [the type](../crates/core/src/device/mod.rs), `Device::users`, `device/mod.rs`,\n\
                    `crates/core`, `/dev/vfio/vfio`, `EBUSY`, `vfioctl run`, `read`, `some_word`, `Arc`.\n\
                    \n\
                    | Promise | Kept in | Test |\n\
                    |---|---|---|\n\
                    | a | `device/` | `core` `device::tests::it_lives`, `any_order`, `device::tests::random::*` |\n\
                    | b | `Device` | `device/tests.rs::it_lives`, `tests.rs::*`, `misuse/*`, `misuse/twice.rs` |\n\
                    \n\
                    | Path | What |\n\
                    |---|---|\n\
                    | `crates/core` | `device/` (what `vfio0` is) |\n";
        assert!(with(text).is_empty(), "{:?}", with(text));
    }

    #[test]
    fn what_is_not_there_is_told_with_its_line() {
        for (text, missing) in [
            ("[it](src/lib.rs)", "src/lib.rs"),
            ("`crates/shell`", "crates/shell"),
            ("`device/file.rs`", "device/file.rs"),
            ("`Devices`", "Devices"),
            ("`Device::owners`", "Device::owners"),
            ("`device::tests::it_dies`", "device::tests::it_dies"),
            ("`group::tests::*`", "group::tests::*"),
            ("`mod.rs::it_lives`", "mod.rs::it_lives"),
            ("`misuses/*`", "misuses/*"),
            ("| Test |\n|---|\n| `it_dies` |", "it_dies"),
            ("| Kept in |\n|---|\n| `bus/` |", "bus/"),
            (
                "| Path | What |\n|---|---|\n| `crates/core` | `bus` |",
                "bus",
            ),
        ] {
            let line = text.lines().count();
            assert_eq!(
                with(text),
                [format!("docs/life.md:{line}: `{missing}` is not there")]
            );
        }
    }

    #[test]
    fn the_code_map_has_every_crate() {
        let files = [
            ("ARCHITECTURE.md", "`crates/a`"),
            ("crates/a/Cargo.toml", ""),
            ("crates/b/Cargo.toml", ""),
        ];
        assert_eq!(
            problems(
                &files
                    .map(|(name, text)| (name.to_owned(), text.to_owned()))
                    .into()
            ),
            ["ARCHITECTURE.md: `crates/b` is not in the code map"]
        );
    }
}

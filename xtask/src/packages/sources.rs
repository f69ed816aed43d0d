//! The private apt sources: the machine's own, with backports added.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;

use crate::workspace;

/// One stanza of a `.sources` file, lines kept as they are.
type Stanza = String;

/// What the machine's sources say about `codename`, with `codename-backports` added next to
/// `codename`, as the text of one `.sources` file. Sources of other origins are left out: what the
/// tests run comes from Debian alone. Mirrors, keyrings and options are the machine's.
///
/// # Errors
/// No source of the machine has the release.
pub(crate) fn derive(etc_apt: &Path, codename: &str) -> Result<String> {
    let text = with_backports(&stanzas(etc_apt)?, codename);
    if text.is_empty() {
        bail!(
            "no source in {} has the suite {codename}: the private packages come from the machine's own mirror",
            etc_apt.display()
        );
    }
    Ok(text)
}

/// The same of a later release and its backports: where the machine gets `codename` from, its
/// suites replaced. Mirrors and keyrings are the machine's, and Debian signs both releases with
/// keys that one keyring has.
///
/// # Errors
/// No source of the machine has `codename`.
pub(crate) fn derive_later(etc_apt: &Path, codename: &str, later: &str) -> Result<String> {
    let text = of_later(&stanzas(etc_apt)?, codename, later);
    if text.is_empty() {
        bail!(
            "no source in {} has the suite {codename}: the packages of {later} come from the same mirror",
            etc_apt.display()
        );
    }
    Ok(text)
}

/// All enabled stanzas of the machine.
fn stanzas(etc_apt: &Path) -> Result<Vec<Stanza>> {
    let mut stanzas: Vec<Stanza> = Vec::new();
    let mut files = vec![etc_apt.join("sources.list")];
    let parts = etc_apt.join("sources.list.d");
    if let Ok(entries) = std::fs::read_dir(&parts) {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    for file in files.iter().filter(|file| file.is_file()) {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => stanzas.extend(of_sources(&workspace::read(file)?)),
            Some("list") => stanzas.extend(of_list(&workspace::read(file)?)),
            _ => {}
        }
    }
    Ok(stanzas)
}

/// The release of this machine, e.g. `bookworm`.
pub(crate) fn codename() -> Result<String> {
    let text = workspace::read(Path::new("/etc/os-release"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release has no VERSION_CODENAME: the end-to-end tests run on Debian 12")
}

/// The stanzas of a deb822 file, without comments and without disabled ones.
fn of_sources(text: &str) -> Vec<Stanza> {
    let mut stanzas = Vec::new();
    let mut stanza = String::new();
    for line in text.lines().chain([""]) {
        if line.trim().is_empty() {
            let enabled = field(&stanza, "Enabled").is_none_or(|value| value != "no");
            if !stanza.is_empty() && enabled {
                stanzas.push(std::mem::take(&mut stanza));
            }
            stanza.clear();
        } else if !line.starts_with('#') {
            stanza.push_str(line);
            stanza.push('\n');
        }
    }
    stanzas
}

/// The `deb` lines of a one-line file, each as a stanza.
fn of_list(text: &str) -> Vec<Stanza> {
    text.lines().filter_map(of_line).collect()
}

fn of_line(line: &str) -> Option<Stanza> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let mut rest = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim();
    let mut stanza = "Types: deb\n".to_owned();
    if let Some(options) = rest.strip_prefix('[') {
        let (options, after) = options.split_once(']')?;
        rest = after.trim();
        for option in options.split_whitespace() {
            let (key, value) = option.split_once('=')?;
            let key = match key {
                "signed-by" => "Signed-By",
                "arch" => "Architectures",
                "trusted" => "Trusted",
                "check-valid-until" => "Check-Valid-Until",
                "by-hash" => "By-Hash",
                _ => continue,
            };
            writeln!(stanza, "{key}: {}", value.replace(',', " ")).ok()?;
        }
    }
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let components: Vec<&str> = words.collect();
    writeln!(stanza, "URIs: {uri}\nSuites: {suite}").ok()?;
    if !components.is_empty() {
        writeln!(stanza, "Components: {}", components.join(" ")).ok()?;
    }
    Some(stanza)
}

/// The value of a one-line field.
fn field<'a>(stanza: &'a str, name: &str) -> Option<&'a str> {
    stanza.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// Those stanzas that are about the release, only its suites in each, binary packages only, and
/// backports beside the release itself.
fn with_backports(stanzas: &[Stanza], codename: &str) -> String {
    let backports = format!("{codename}-backports");
    let ours = [
        codename.to_owned(),
        format!("{codename}-updates"),
        format!("{codename}-security"),
        backports.clone(),
    ];
    with_suites(stanzas, |mut suites| {
        suites.retain(|suite| ours.contains(suite));
        if suites.iter().any(|suite| suite == codename) && !suites.contains(&backports) {
            suites.push(backports.clone());
        }
        suites
    })
}

/// Those stanzas that have `codename`, with `later` and its backports in its place.
fn of_later(stanzas: &[Stanza], codename: &str, later: &str) -> String {
    with_suites(stanzas, |suites| {
        if suites.iter().any(|suite| suite == codename) {
            vec![later.to_owned(), format!("{later}-backports")]
        } else {
            Vec::new()
        }
    })
}

/// The stanzas of binary packages, each with the suites that `choose` makes of its own; one without
/// any is left out.
fn with_suites(stanzas: &[Stanza], choose: impl Fn(Vec<String>) -> Vec<String>) -> String {
    let mut text = String::new();
    for stanza in stanzas {
        if !field(stanza, "Types").is_some_and(|types| types.split_whitespace().any(|t| t == "deb"))
        {
            continue;
        }
        let own = field(stanza, "Suites").unwrap_or_default();
        let suites = choose(own.split_whitespace().map(str::to_owned).collect());
        if suites.is_empty() {
            continue;
        }
        for line in stanza.lines() {
            let key = line.split(':').next().unwrap_or_default();
            if key.eq_ignore_ascii_case("Suites") {
                text.push_str(&format!("Suites: {}\n", suites.join(" ")));
            } else if key.eq_ignore_ascii_case("Types") {
                text.push_str("Types: deb\n");
            } else {
                text.push_str(line);
                text.push('\n');
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backports_stand_beside_the_release_and_others_stay_out() {
        let text = "# comment\nTypes: deb deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By: /usr/share/keyrings/debian.gpg\n\n\
                    Types: deb\nURIs: http://mirror.example/security\nSuites: bookworm-security\nComponents: main\n\n\
                    Types: deb\nURIs: http://other.example/\nSuites: stable\nComponents: main\n\n\
                    Types: deb\nEnabled: no\nURIs: http://mirror.example/off\nSuites: bookworm\n";
        assert_eq!(
            with_backports(&of_sources(text), "bookworm"),
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates bookworm-backports\n\
             Components: main\nSigned-By: /usr/share/keyrings/debian.gpg\n\n\
             Types: deb\nURIs: http://mirror.example/security\nSuites: bookworm-security\nComponents: main\n\n"
        );
    }

    #[test]
    fn a_later_release_comes_from_the_same_mirror() {
        let text = "Types: deb deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By: /usr/share/keyrings/debian.gpg\n\n\
                    Types: deb\nURIs: http://mirror.example/security\nSuites: bookworm-security\nComponents: main\n\n\
                    Types: deb\nURIs: http://other.example/\nSuites: stable\nComponents: main\n";
        assert_eq!(
            of_later(&of_sources(text), "bookworm", "trixie"),
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie trixie-backports\n\
             Components: main\nSigned-By: /usr/share/keyrings/debian.gpg\n\n"
        );
    }

    #[test]
    fn one_line_sources_keep_their_options() {
        let text = "deb [arch=amd64,arm64 signed-by=/etc/k.gpg] http://mirror.example/debian bookworm main contrib # x\n\
                    #deb http://mirror.example/debian bookworm main\n\
                    deb-src http://mirror.example/debian bookworm main\n";
        assert_eq!(
            with_backports(&of_list(text), "bookworm"),
            "Types: deb\nArchitectures: amd64 arm64\nSigned-By: /etc/k.gpg\nURIs: http://mirror.example/debian\n\
             Suites: bookworm bookworm-backports\nComponents: main contrib\n\n"
        );
    }

    #[test]
    fn a_machine_without_the_release_is_an_error() {
        let empty = std::env::temp_dir().join("vfiod-xtask-no-such-directory");
        let error = derive(&empty, "bookworm").expect_err("there are no sources");
        assert!(error.to_string().contains("bookworm"), "{error}");
    }
}

//! apt with a state of its own: what it fetches is unpacked where it is told, never installed.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;

use crate::workspace;
use crate::workspace::output;

/// One state: configuration, lists and archives below a directory, for the suites of one release.
pub(super) struct Apt {
    dir: PathBuf,
    release: &'static str,
}

impl Apt {
    /// Writes its configuration and `sources` (a `.sources` file's text, with `release` and its
    /// backports in it) and fetches its lists.
    pub(super) fn prepare(dir: &Path, release: &'static str, sources: &str) -> Result<Self> {
        for part in ["state/lists/partial", "cache/archives/partial", "etc/parts"] {
            fs::create_dir_all(dir.join(part))
                .with_context(|| format!("creating {part} for apt"))?;
        }
        workspace::write(&dir.join("state/status"), "")?;
        workspace::write(&dir.join("etc/sources/debian.sources"), sources)?;
        workspace::write(&dir.join("apt.conf"), &Self::configuration(dir)?)?;
        let apt = Self {
            dir: dir.to_owned(),
            release,
        };
        output(
            apt.command("apt-get")
                .args(["-q", "update", "--error-on=any"]),
        )
        .with_context(|| {
            format!(
                "could not fetch the package lists of {release} and {release}-backports from the \
                 machine's own mirror"
            )
        })?;
        Ok(apt)
    }

    /// How the machine fetches (proxies, mirrors' quirks) is kept; where apt keeps things, what it
    /// runs afterwards and what it takes as installed (nothing) is ours.
    fn configuration(dir: &Path) -> Result<String> {
        let dump = output(Command::new("apt-config").arg("dump"))?;
        let mut text = String::new();
        for line in dump.lines() {
            if line.starts_with("Acquire::")
                && !line.starts_with("Acquire::IndexTargets")
                && !line.starts_with("Acquire::Languages")
            {
                text.push_str(line);
                text.push('\n');
            }
        }
        let dir = dir.display();
        write!(
            text,
            r#"Acquire::Languages "none";
Acquire::Retries "3";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Dir::State "{dir}/state";
Dir::State::status "{dir}/state/status";
Dir::Cache "{dir}/cache";
Dir::Etc::main "/dev/null";
Dir::Etc::parts "{dir}/etc/parts";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{dir}/etc/sources";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "{dir}/etc/parts";
"#
        )
        .context("writing the configuration of apt")?;
        Ok(text)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("APT_CONFIG", self.dir.join("apt.conf"))
            .env("LC_ALL", "C.UTF-8")
            .current_dir(&self.dir);
        command
    }

    /// Fetches `names` with all they need and unpacks all of it below `to`, but not `left_out`.
    /// Returns what was unpacked, as `name_version_arch.deb`.
    pub(super) fn unpack_all(
        &self,
        names: &[&str],
        left_out: &[&str],
        to: &Path,
    ) -> Result<Vec<String>> {
        output(
            self.command("apt-get")
                .args(["-q", "-y", "--download-only", "-t"])
                .arg(format!("{}-backports", self.release))
                .arg("install")
                .args(names),
        )
        .with_context(|| {
            format!(
                "could not fetch {} and what they depend on",
                names.join(", ")
            )
        })?;
        let archives = self.dir.join("cache/archives");
        let mut done = Vec::new();
        for entry in fs::read_dir(&archives).context("reading the fetched archives")? {
            let path = entry.context("reading the fetched archives")?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let package = name.split('_').next().unwrap_or_default();
            if path.extension().is_some_and(|extension| extension == "deb")
                && !left_out.contains(&package)
            {
                unpack(&path, to)?;
                done.push(name);
            }
        }
        done.sort();
        Ok(done)
    }

    /// Fetches one package without what it depends on and unpacks it below `to`.
    pub(super) fn unpack_one(&self, name: &str, to: &Path) -> Result<String> {
        output(self.command("apt-get").args(["-q", "download", name]))
            .with_context(|| format!("could not fetch {name}"))?;
        let start = format!("{name}_");
        for entry in fs::read_dir(&self.dir).context("reading the fetched archives")? {
            let path = entry.context("reading the fetched archives")?.path();
            let file = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if file.starts_with(&start) {
                unpack(&path, to)?;
                return Ok(file);
            }
        }
        bail!("apt fetched {name}, but left no archive of it")
    }

    /// The package of the newest kernel of the release, or of its backports, that `meta` names.
    pub(super) fn kernel(&self, meta: &str, backports: bool) -> Result<String> {
        let table = output(self.command("apt-cache").args(["madison", meta]))?;
        let version = newest(&table, backports).with_context(|| {
            format!(
                "{meta} is not in {}{}",
                self.release,
                if backports { "-backports" } else { "" }
            )
        })?;
        let depends = output(
            self.command("apt-cache")
                .args(["depends", &format!("{meta}={version}")]),
        )?;
        depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"))
            .map(str::to_owned)
            .with_context(|| format!("{meta} {version} depends on no kernel"))
    }
}

/// The first, which is the newest, version in a `madison` table that is in backports, or is not.
fn newest(table: &str, backports: bool) -> Option<&str> {
    table.lines().find_map(|line| {
        let mut columns = line.split('|').map(str::trim);
        let (_, version, origin) = (columns.next()?, columns.next()?, columns.next()?);
        let suite = origin.split_whitespace().nth(1)?.split('/').next()?;
        (suite.ends_with("-backports") == backports).then_some(version)
    })
}

fn unpack(archive: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("creating {}", to.display()))?;
    output(Command::new("dpkg-deb").arg("-x").arg(archive).arg(to)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
 linux-image-cloud-amd64 | 6.12.95-1~bpo12+1 | http://mirror.example/debian bookworm-backports/main amd64 Packages
 linux-image-cloud-amd64 | 6.1.187-1 | http://mirror.example/debian-security bookworm-security/main amd64 Packages
 linux-image-cloud-amd64 | 6.1.176-1 | http://mirror.example/debian bookworm/main amd64 Packages
";

    #[test]
    fn each_suite_gives_its_newest_kernel() {
        assert_eq!(newest(TABLE, true), Some("6.12.95-1~bpo12+1"));
        assert_eq!(newest(TABLE, false), Some("6.1.187-1"));
        assert_eq!(newest("", true), None);
    }
}

//! The private prefix: programs, headers and guest kernels that Debian 12 has only in its backports,
//! or that must not be installed on the machine. apt resolves, fetches and checks them with a state
//! of its own; `dpkg-deb -x` unpacks them below `target/private`; nothing of the machine changes.
//!
//! ```text
//! target/private/
//!   stamp                        what is unpacked; if it fits, nothing is fetched
//!   bin/qemu-system-x86_64       runs QEMU from the prefix
//!   bookworm-backports/          usr/bin, usr/lib, usr/include, bin/busybox ...
//!   kernels/bookworm, /backports boot/vmlinuz-*, boot/config-*, lib/modules/*
//! ```

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;

use super::sources;
use crate::workspace;
use crate::workspace::output;

/// Raised when something here changes what ends up in the prefix.
const RECIPE: u32 = 1;

/// The release whose backports are used.
const RELEASE: &str = "bookworm";

/// What is unpacked into the prefix, with everything it depends on.
const PACKAGES: &[&str] = &["busybox-static", "linux-libc-dev", "qemu-system-x86"];

/// Dependencies that the machine's own must serve: the C library goes with the machine's loader.
const LEFT_OUT: &[&str] = &["libc6"];

/// The package that names the newest kernel. The cloud flavour is a stock Debian kernel with the
/// drivers a guest can meet, and a third of the size.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Runs QEMU with the libraries and firmware beside it, wherever the prefix is.
const QEMU_WRAPPER: &str = r#"#!/bin/sh
# Runs QEMU from the private prefix: its libraries, modules and firmware, nothing of the machine's.
prefix=$(dirname "$(dirname "$(readlink -f "$0")")")/bookworm-backports
lib=x86_64-linux-gnu
export LD_LIBRARY_PATH="$prefix/usr/lib/$lib:$prefix/lib/$lib"
export QEMU_MODULE_DIR="$prefix/usr/lib/$lib/qemu"
exec "$prefix/usr/bin/qemu-system-x86_64" \
    -L "$prefix/usr/share/qemu" -L "$prefix/usr/share/seabios" -L "$prefix/usr/lib/ipxe/qemu" "$@"
"#;

/// Makes the prefix, or finds that it is made.
///
/// # Errors
/// The machine is not of the release, or something could not be fetched; the message says what.
pub(crate) fn ensure(private: &Path) -> Result<()> {
    fs::create_dir_all(private).with_context(|| format!("creating {}", private.display()))?;
    let lock = fs::File::create(private.join("lock"))
        .context("creating the lock of the private prefix")?;
    // Two runs at once share the prefix: the second waits for the first to finish making it.
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .context("locking the private prefix")?;
    let stamp = private.join("stamp");
    if fs::read_to_string(&stamp).is_ok_and(|text| text.starts_with(&recipe())) {
        return Ok(());
    }
    let codename = sources::codename()?;
    if codename != RELEASE {
        bail!(
            "this machine is {codename}; the tests with real clients take QEMU, headers and kernels from \
             {RELEASE}-backports and need Debian 12 ({RELEASE})"
        );
    }
    println!(
        "private prefix: fetching {}, two guest kernels, and what they need, into {} (nothing is installed)",
        PACKAGES.join(", "),
        private.display()
    );
    for old in ["stamp", "apt", "bin", "bookworm-backports", "kernels"] {
        remove(&private.join(old))?;
    }
    let apt = Apt::prepare(&private.join("apt"))?;
    let prefix = private.join("bookworm-backports");
    let mut unpacked = apt.unpack_all(PACKAGES, LEFT_OUT, &prefix)?;
    for (place, backports) in [("bookworm", false), ("backports", true)] {
        let package = apt.kernel(backports)?;
        unpacked.push(apt.unpack_one(&package, &private.join("kernels").join(place))?);
        depmod(&private.join("kernels").join(place))?;
    }
    let wrapper = private.join("bin/qemu-system-x86_64");
    workspace::write(&wrapper, QEMU_WRAPPER)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))
        .context("making the QEMU wrapper executable")?;
    let version = output(Command::new(&wrapper).arg("--version"))
        .context("QEMU does not run from the prefix")?;
    println!(
        "private prefix: {}",
        version.lines().next().unwrap_or_default()
    );
    // The archives and lists are several times what they unpack to, and of no further use.
    remove(&private.join("apt"))?;
    workspace::write(&stamp, &format!("{}{}\n", recipe(), unpacked.join("\n")))
}

/// The first lines of a stamp that fits.
fn recipe() -> String {
    format!("recipe {RECIPE}\n{}\n{KERNEL}\n", PACKAGES.join(" "))
}

fn remove(path: &Path) -> Result<()> {
    let result = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Writes `modules.dep`, which the package leaves to the machine it is installed on.
fn depmod(kernel: &Path) -> Result<()> {
    let modules = kernel.join("lib/modules");
    let release = fs::read_dir(&modules)
        .with_context(|| format!("reading {}", modules.display()))?
        .next()
        .context("the kernel package has no modules")??
        .file_name();
    output(
        Command::new("/sbin/depmod")
            .arg("-b")
            .arg(kernel)
            .arg(release),
    )
    .map(drop)
}

/// apt with a state of its own.
struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Writes its configuration and sources and fetches its lists.
    fn prepare(dir: &Path) -> Result<Self> {
        for part in ["state/lists/partial", "cache/archives/partial", "etc/parts"] {
            fs::create_dir_all(dir.join(part))
                .with_context(|| format!("creating {part} for apt"))?;
        }
        workspace::write(&dir.join("state/status"), "")?;
        workspace::write(
            &dir.join("etc/sources/debian.sources"),
            &sources::derive(Path::new("/etc/apt"), RELEASE)?,
        )?;
        workspace::write(&dir.join("apt.conf"), &Self::configuration(dir)?)?;
        let apt = Self {
            dir: dir.to_owned(),
        };
        output(apt.command("apt-get").args(["-q", "update", "--error-on=any"]))
            .context("could not fetch the package lists of bookworm and bookworm-backports from the machine's own mirror")?;
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
    fn unpack_all(&self, names: &[&str], left_out: &[&str], to: &Path) -> Result<Vec<String>> {
        output(
            self.command("apt-get")
                .args(["-q", "-y", "--download-only", "-t"])
                .arg(format!("{RELEASE}-backports"))
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
    fn unpack_one(&self, name: &str, to: &Path) -> Result<String> {
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

    /// The package of the newest kernel of the release, or of its backports.
    fn kernel(&self, backports: bool) -> Result<String> {
        let table = output(self.command("apt-cache").args(["madison", KERNEL]))?;
        let version = newest(&table, backports).with_context(|| {
            format!(
                "{KERNEL} is not in {RELEASE}{}",
                if backports { "-backports" } else { "" }
            )
        })?;
        let depends = output(
            self.command("apt-cache")
                .args(["depends", &format!("{KERNEL}={version}")]),
        )?;
        depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"))
            .map(str::to_owned)
            .with_context(|| format!("{KERNEL} {version} depends on no kernel"))
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

    #[test]
    fn a_stamp_fits_its_own_recipe_only() {
        assert!(format!("{}seabios_1_all.deb\n", recipe()).starts_with(&recipe()));
        assert!(!"recipe 0\n".starts_with(&recipe()));
    }
}

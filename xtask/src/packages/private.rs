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
//!   trixie-backports/            QEMU 11, see `trixie`
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;

use super::apt::Apt;
use super::sources;
use super::trixie;
use crate::workspace;
use crate::workspace::output;

/// Raised when something here changes what ends up in the prefix.
const RECIPE: u32 = 1;

/// The release whose backports are used.
pub(super) const RELEASE: &str = "bookworm";

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
    bookworm(private)?;
    // The other tests do without it; those that need it say that it is missing, and that counts.
    if let Err(error) = trixie::ensure(private) {
        eprintln!("private prefix: no QEMU 11: {error:#}");
    }
    Ok(())
}

/// All of it but QEMU 11.
fn bookworm(private: &Path) -> Result<()> {
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
    let apt = Apt::prepare(
        &private.join("apt"),
        RELEASE,
        &sources::derive(Path::new("/etc/apt"), RELEASE)?,
    )?;
    let prefix = private.join("bookworm-backports");
    let mut unpacked = apt.unpack_all(PACKAGES, LEFT_OUT, &prefix)?;
    for (place, backports) in [("bookworm", false), ("backports", true)] {
        let package = apt.kernel(KERNEL, backports)?;
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

/// Removes a file or a directory with all in it; nothing there is fine.
pub(super) fn remove(path: &Path) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_fits_its_own_recipe_only() {
        assert!(format!("{}seabios_1_all.deb\n", recipe()).starts_with(&recipe()));
        assert!(!"recipe 0\n".starts_with(&recipe()));
    }
}

//! QEMU 11 for the private prefix. Debian 12 has no QEMU that speaks vfio-user; the backports of
//! Debian 13 have. It comes with everything it is linked to, its C library and loader included, for
//! the machine's own are older.
//!
//! ```text
//! target/private/trixie-backports/
//!   stamp                        what is unpacked; if it fits, nothing is fetched
//!   qemu-system-x86_64           runs it
//!   loader/qemu-system-x86_64    its loader under the program's name, which so is the process's
//!   root/                        usr/bin, usr/lib, usr/share
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;

use super::apt::Apt;
use super::private::remove;
use super::sources;
use crate::workspace;
use crate::workspace::output;

/// Raised when something here changes what ends up in the prefix.
const RECIPE: u32 = 1;

/// The release whose backports are used.
const RELEASE: &str = "trixie";

/// What is unpacked, with everything it depends on.
const PACKAGES: &[&str] = &["qemu-system-x86"];

/// Runs QEMU by its own loader. The loader ignores the machine's cache of libraries, and what QEMU
/// loads later is searched in the same place.
const WRAPPER: &str = r#"#!/bin/sh
# Runs QEMU 11 from the private prefix: its loader, libraries, modules and firmware.
here=$(dirname "$(readlink -f "$0")")
lib="$here/root/usr/lib/x86_64-linux-gnu"
export QEMU_MODULE_DIR="$lib/qemu"
exec "$here/loader/qemu-system-x86_64" --inhibit-cache --library-path "$lib" \
    "$here/root/usr/bin/qemu-system-x86_64" \
    -L "$here/root/usr/share/qemu" -L "$here/root/usr/share/seabios" "$@"
"#;

/// Makes this part of the prefix, or finds that it is made. The prefix is locked by the caller.
///
/// # Errors
/// Something could not be fetched, or QEMU does not run; the message says what.
pub(super) fn ensure(private: &Path) -> Result<()> {
    let place = private.join("trixie-backports");
    let stamp = place.join("stamp");
    if fs::read_to_string(&stamp).is_ok_and(|text| text.starts_with(&recipe())) {
        return Ok(());
    }
    println!(
        "private prefix: fetching QEMU 11 ({} of {RELEASE}-backports) and what it needs, into {} \
         (nothing is installed)",
        PACKAGES.join(", "),
        place.display()
    );
    remove(&place)?;
    let apt = Apt::prepare(
        &place.join("apt"),
        RELEASE,
        &sources::derive_later(Path::new("/etc/apt"), super::private::RELEASE, RELEASE)?,
    )?;
    let root = place.join("root");
    let unpacked = apt.unpack_all(PACKAGES, &[], &root)?;
    fs::create_dir_all(place.join("loader")).context("creating the directory of the loader")?;
    symlink(
        "../root/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
        place.join("loader/qemu-system-x86_64"),
    )
    .context("naming the loader")?;
    let wrapper = place.join("qemu-system-x86_64");
    workspace::write(&wrapper, WRAPPER)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))
        .context("making the QEMU wrapper executable")?;
    let version = output(Command::new(&wrapper).arg("--version"))
        .context("QEMU 11 does not run from the prefix")?;
    let help = output(Command::new(&wrapper).args(["-device", "vfio-user-pci,help"]))?;
    if !help.contains("socket=<SocketAddress>") {
        bail!(
            "{} has no vfio-user-pci",
            version.lines().next().unwrap_or_default()
        );
    }
    println!(
        "private prefix: {}",
        version.lines().next().unwrap_or_default()
    );
    remove(&place.join("apt"))?;
    workspace::write(&stamp, &format!("{}{}\n", recipe(), unpacked.join("\n")))
}

/// The first lines of a stamp that fits.
fn recipe() -> String {
    format!("recipe {RECIPE}\n{}\n", PACKAGES.join(" "))
}

//! Packages that the tests use as the machine has them: compilers, and tools that read `/sys`.

use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;

use crate::workspace;

/// The packages, and what for.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "builds the C client"),
    ("libc6-dev", "its C library"),
    ("kmod", "depmod, for the guests' kernels"),
    ("mdevctl", "a real client of the mdev bus"),
    ("pciutils", "lspci, run in guests"),
    ("psmisc", "fuser, a real client of the nodes"),
    ("udev", "udevadm, a real client of /sys and of uevents"),
    ("util-linux", "setpriv, unshare and nsenter"),
    ("xz-utils", "kernel modules of newer kernels are compressed"),
];

/// Makes sure that all packages are there. Says which it installs before it does.
///
/// # Errors
/// Packages are missing and cannot be installed: not root, not a Debian, or apt failed.
/// The message names them and the command to run.
pub(crate) fn ensure() -> Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    let advice = format!("apt-get update && apt-get install --no-install-recommends {names}");
    if !rustix::process::geteuid().is_root() {
        for (name, what) in PACKAGES.iter().filter(|(name, _)| missing.contains(name)) {
            eprintln!("missing: {name:12} ({what})");
        }
        bail!("the tests need packages that are not installed; run as root: {advice}");
    }
    println!("installing packages of this Debian release: {names}");
    // The lists may be missing (a fresh container) or old; only a failure is worth the update.
    if install(&missing).is_err() {
        println!("updating the package lists, then trying again");
        workspace::output(Command::new("apt-get").args(["-q", "update"]))
            .context("`apt-get update` failed: is the network there?")?;
        install(&missing)
            .with_context(|| format!("could not install; to try by hand: {advice}"))?;
    }
    Ok(())
}

fn install(names: &[&str]) -> Result<()> {
    workspace::output(
        Command::new("apt-get")
            // Another apt may be at work, as on a machine that has just started.
            .args([
                "-q",
                "-y",
                "-o",
                "DPkg::Lock::Timeout=300",
                "--no-install-recommends",
                "install",
            ])
            .args(names)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
    .map(drop)
}

/// The packages of [`PACKAGES`] that dpkg does not list as installed.
fn missing() -> Result<Vec<&'static str>> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f=${binary:Package} ${db:Status-Status}\n"])
        .output()
        .context("running dpkg-query: the end-to-end tests run on Debian 12")?;
    let installed = String::from_utf8_lossy(&output.stdout);
    Ok(PACKAGES
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| !is_installed(&installed, name))
        .collect())
}

/// True if dpkg's list, lines of `name[:arch] status`, has `name` as installed.
fn is_installed(list: &str, name: &str) -> bool {
    list.lines().any(|line| {
        line.split_once(' ').is_some_and(|(package, status)| {
            status == "installed" && package.split(':').next() == Some(name)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let list = "gcc installed\nlibc6-dev:amd64 installed\nudev config-files\n";
        assert!(is_installed(list, "gcc"));
        assert!(is_installed(list, "libc6-dev"));
        assert!(!is_installed(list, "udev"));
        assert!(!is_installed(list, "libc6"));
    }
}

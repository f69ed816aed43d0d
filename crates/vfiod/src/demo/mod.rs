//! `vfiod demo`: the life of a device, step by step.

/// Runs it.
pub(crate) fn run() -> anyhow::Result<()> {
    anyhow::bail!("this build has no demo")
}

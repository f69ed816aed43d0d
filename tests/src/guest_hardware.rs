//! What tests ask a guest about its hardware, and QEMU about the guest.

use std::io::BufRead as _;
use std::io::BufReader;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::guest::Guest;

/// How long QEMU's monitor may take to answer.
const MONITOR_LIMIT: Duration = Duration::from_secs(10);

/// A line of `/proc/interrupts`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupt {
    /// Its number. A driver that has to do without polls, and has no line.
    pub number: u32,
    /// How often it came, on all processors together.
    pub count: u64,
}

impl Guest {
    /// The names of the serial ports that the guest's driver made for a PCI device, such as
    /// `ttyS4`, in order.
    ///
    /// # Errors
    /// As [`Guest::check`]; the device has no driver, or it made no port.
    pub fn serial_ports(&mut self, address: &str, limit: Duration) -> Result<Vec<String>, String> {
        let ports = self.check(
            &format!("ls -1 /sys/bus/pci/devices/{address}/tty | sort -V"),
            limit,
        )?;
        Ok(ports.lines().map(str::to_owned).collect())
    }

    /// The interrupt that a driver asked for under `name`: for a serial port its name, while it is
    /// open. `None` if there is no such line.
    ///
    /// # Errors
    /// As [`Guest::check`].
    pub fn interrupt(&mut self, name: &str, limit: Duration) -> Result<Option<Interrupt>, String> {
        Ok(parse_interrupt(
            &self.check("cat /proc/interrupts", limit)?,
            name,
        ))
    }

    /// Sends one QMP command, as JSON, to QEMU and returns the line that answers it.
    ///
    /// # Errors
    /// QEMU does not answer in 10 s, or answers with an error, which is the message then.
    pub fn monitor(&self, command: &str) -> Result<String, String> {
        let told = |error: std::io::Error| format!("QEMU's monitor: {error}");
        let stream = UnixStream::connect(self.monitor_path()).map_err(told)?;
        stream.set_read_timeout(Some(MONITOR_LIMIT)).map_err(told)?;
        let mut lines = BufReader::new(&stream).lines();
        let mut answer = || loop {
            let line = lines
                .next()
                .ok_or("QEMU's monitor: closed")?
                .map_err(told)?;
            if line.contains("\"error\"") {
                return Err(line);
            }
            // Events come in between.
            if line.contains("\"return\"") || line.contains("\"QMP\"") {
                return Ok(line);
            }
        };
        answer()?;
        let mut ask = |command: &str| {
            (&stream)
                .write_all(format!("{command}\n").as_bytes())
                .map_err(told)?;
            answer()
        };
        ask(r#"{"execute": "qmp_capabilities"}"#)?;
        ask(command)
    }
}

/// Finds the line whose names, separated by commas at its end, have `name`.
fn parse_interrupt(text: &str, name: &str) -> Option<Interrupt> {
    let mut lines = text.lines();
    let processors = lines.next()?.split_whitespace().count();
    lines.find_map(|line| {
        let (number, rest) = line.split_once(':')?;
        let words: Vec<&str> = rest.split_whitespace().collect();
        let (last, before) = words.split_last()?;
        let others = before.iter().rev().take_while(|word| word.ends_with(','));
        if !others
            .chain([last])
            .any(|word| word.trim_end_matches(',') == name)
        {
            return None;
        }
        Some(Interrupt {
            number: number.trim().parse().ok()?,
            count: words
                .iter()
                .take(processors)
                .filter_map(|word| word.parse::<u64>().ok())
                .sum(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_summed_over_processors() {
        let text = "           CPU0       CPU1\n  4:        100          2   IO-APIC   4-edge      ttyS0\n 10:          7          0   IO-APIC  10-fasteoi   ttyS4, ttyS5\nNMI:          0          0   Non-maskable interrupts\n";
        assert_eq!(
            parse_interrupt(text, "ttyS0"),
            Some(Interrupt {
                number: 4,
                count: 102
            })
        );
        assert_eq!(
            parse_interrupt(text, "ttyS5"),
            Some(Interrupt {
                number: 10,
                count: 7
            })
        );
        assert_eq!(
            parse_interrupt(text, "ttyS4"),
            Some(Interrupt {
                number: 10,
                count: 7
            })
        );
        assert_eq!(parse_interrupt(text, "ttyS6"), None);
    }
}

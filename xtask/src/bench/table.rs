//! The table for people, and lines for programs.

use std::fmt::Write as _;

use serde_json::json;

use super::Goal;
use super::Row;
use super::measure::Measured;

/// A Markdown table, with the known reasons of misses below it.
pub(super) fn text(rows: &[Row]) -> String {
    let mut lines = vec![[
        "measure".to_owned(),
        "against, in the same run".to_owned(),
        "ratio".to_owned(),
        "middle half".to_owned(),
        "goal".to_owned(),
        "met".to_owned(),
    ]];
    for row in rows {
        let (ratio, spread) = match &row.measured {
            Ok(measured) => {
                let (low, high) = measured.spread();
                (
                    format!("{:.3}", measured.ratio()),
                    format!("{low:.3}..{high:.3}"),
                )
            }
            Err(_) => ("none".to_owned(), String::new()),
        };
        lines.push([
            row.benchmark.name.to_owned(),
            row.benchmark.against.to_owned(),
            ratio,
            spread,
            goal(row.benchmark.goal),
            if row.is_met() { "yes" } else { "NO" }.to_owned(),
        ]);
    }
    let widths: Vec<usize> = (0..6)
        .map(|column| {
            lines
                .iter()
                .filter_map(|line| line.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        for (cell, width) in line.iter().zip(&widths) {
            let _ = write!(text, "| {cell:width$} ");
        }
        text.push_str("|\n");
        if number == 0 {
            for width in &widths {
                let _ = write!(text, "|{}", "-".repeat(width + 2));
            }
            text.push_str("|\n");
        }
    }
    for row in rows.iter().filter(|row| !row.is_met()) {
        let name = row.benchmark.name;
        let _ = match &row.measured {
            Ok(_) => {
                let why = row.benchmark.known_miss.unwrap_or("not explained yet");
                writeln!(text, "{name}: missed; {why}")
            }
            Err(error) => writeln!(text, "{name}: not run; {error:#}"),
        };
    }
    text
}

/// One JSON object a line.
pub(super) fn json(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        let line = json!({
            "name": row.benchmark.name,
            "against": row.benchmark.against,
            "ratio": row.measured.as_ref().map(Measured::ratio).ok(),
            "ours": row.measured.as_ref().map(Measured::ours).ok(),
            "base": row.measured.as_ref().map(Measured::base).ok(),
            "error": row.measured.as_ref().err().map(|error| format!("{error:#}")),
            "goal": goal(row.benchmark.goal),
            "pass": row.is_met(),
        });
        let _ = writeln!(text, "{line}");
    }
    text
}

fn goal(goal: Goal) -> String {
    match goal {
        Goal::AtMost(limit) => format!("<= {limit}"),
        Goal::AtLeast(limit) => format!(">= {limit}"),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use super::super::Benchmark;
    use super::*;

    fn measured(_: u32) -> Result<Measured> {
        Measured::interleaved(3, || Ok(3.0), || Ok(2.0))
    }

    fn row(goal: Goal) -> Row {
        let benchmark = Benchmark {
            name: "pread",
            against: "null server",
            goal,
            known_miss: None,
            run: measured,
        };
        Row {
            benchmark,
            measured: (benchmark.run)(3),
        }
    }

    #[test]
    fn columns_line_up_and_misses_are_told() {
        let text = text(&[row(Goal::AtMost(1.5)), row(Goal::AtMost(1.15))]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[2],
            "| pread   | null server              | 1.500 | 1.500..1.500 | <= 1.5  | yes |"
        );
        assert_eq!(
            lines[3],
            "| pread   | null server              | 1.500 | 1.500..1.500 | <= 1.15 | NO  |"
        );
        assert_eq!(lines[4], "pread: missed; not explained yet");
    }

    #[test]
    fn json_has_the_verdict() {
        let line = json(&[row(Goal::AtLeast(1.6))]);
        let value: serde_json::Value = serde_json::from_str(&line).expect("it is JSON");
        assert_eq!(value["pass"], false);
        assert_eq!(value["goal"], ">= 1.6");
        assert_eq!(value["ratio"], 1.5);
    }

    #[test]
    fn a_row_that_cannot_run_is_not_met() {
        let mut row = row(Goal::AtMost(1.5));
        row.measured = Err(anyhow::anyhow!("no /dev/fuse"));
        let text = text(std::slice::from_ref(&row));
        assert!(text.ends_with("| NO  |\npread: not run; no /dev/fuse\n"));
        let value: serde_json::Value = serde_json::from_str(&json(&[row])).expect("it is JSON");
        assert_eq!(value["error"], "no /dev/fuse");
        assert_eq!(
            (&value["pass"], &value["ratio"]),
            (&false.into(), &serde_json::Value::Null)
        );
    }
}

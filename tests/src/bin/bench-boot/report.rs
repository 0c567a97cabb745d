// SPDX-License-Identifier: Apache-2.0
//! Figures: as JSON for programs, as a table for people.

use serde_json::{Value, json};

/// One figure, with what it is measured against or promised to be.
#[derive(Debug)]
pub(crate) struct Row {
    name: &'static str,
    unit: &'static str,
    ours: Vec<f64>,
    /// The peer's name and figures, of the same run, in turn with ours.
    peer: Option<(&'static str, Vec<f64>)>,
    /// DESIGN's promise, in words.
    promise: &'static str,
}

impl Row {
    /// A figure measured in turn with a peer's.
    pub(crate) fn pairs(
        name: &'static str,
        unit: &'static str,
        (ours, peer): (Vec<f64>, Vec<f64>),
        peer_name: &'static str,
        promise: &'static str,
    ) -> Self {
        Self {
            name,
            unit,
            ours,
            peer: Some((peer_name, peer)),
            promise,
        }
    }

    /// A figure by itself.
    pub(crate) fn single(
        name: &'static str,
        unit: &'static str,
        value: f64,
        promise: &'static str,
    ) -> Self {
        Self {
            name,
            unit,
            ours: vec![value],
            peer: None,
            promise,
        }
    }

    fn ratio(&self) -> Option<f64> {
        self.peer
            .as_ref()
            .map(|(_, peer)| median(&self.ours) / median(peer))
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "unit": self.unit,
            "median": median(&self.ours),
            "values": self.ours,
            "promise": self.promise,
            "peer": self.peer.as_ref().map(|(name, values)| json!({
                "name": name, "median": median(values), "values": values,
            })),
            "ratio": self.ratio(),
        })
    }
}

/// Everything as JSON.
pub(crate) fn json(rows: &[Row], timeline: &[String], left_out: &[String]) -> Value {
    json!({
        "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
        "timeline": timeline,
        "left_out": left_out,
    })
}

/// Everything as text.
pub(crate) fn print(rows: &[Row], timeline: &[String], left_out: &[String]) {
    if !timeline.is_empty() {
        eprintln!("timeline of the last boot:");
        for line in timeline {
            eprintln!("  {line}");
        }
    }
    eprintln!(
        "{:<44} {:>10} {:>10} {:>6}  promise",
        "median", "ours", "peer", "ratio"
    );
    for row in rows {
        let (peer, ratio) = match (&row.peer, row.ratio()) {
            (Some((_, values)), Some(ratio)) => {
                (format!("{:.1}", median(values)), format!("{ratio:.2}"))
            }
            _ => (String::new(), String::new()),
        };
        let against = row
            .peer
            .as_ref()
            .map_or(String::new(), |(name, _)| format!(" / {name}"));
        let name = format!("{} ({}){against}", row.name, row.unit);
        eprintln!(
            "{name:<44} {:>10.1} {peer:>10} {ratio:>6}  {}",
            median(&row.ours),
            row.promise
        );
    }
    for line in left_out {
        eprintln!("left out: {line}");
    }
}

/// The middle value; of an even number, the mean of the two.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let at = |index| sorted.get(index).copied().unwrap_or(f64::NAN);
    if sorted.len() % 2 == 1 {
        at(middle)
    } else {
        f64::midpoint(at(middle.wrapping_sub(1)), at(middle))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        assert!(median(&[]).is_nan());
    }
}

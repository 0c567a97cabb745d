// SPDX-License-Identifier: Apache-2.0
//! `config`: the values in effect, as a file that says the same, and where each comes from.

use std::fmt::Write;

use crate::config::Sourced;

/// The configuration as TOML.
pub(super) fn toml(sourced: &Sourced) -> String {
    let mut text = match sourced.files.as_slice() {
        [] => "# No file was found: these are the defaults.\n".to_owned(),
        files => format!("# Read: {}\n", files.join(", ")),
    };
    let mut table = "";
    let mut values: Vec<_> = sourced.values().collect();
    // Stable: the keys of a table keep their order.
    values.sort_by_key(|(key, ..)| key.table);
    for (key, value, origin) in values {
        // Writing to a string can't fail.
        if key.table != table {
            table = key.table;
            let _ = write!(text, "\n[{table}]\n");
        }
        let _ = writeln!(text, "{} = {value} # {origin}", key.name);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Named;

    #[test]
    fn what_is_shown_says_the_same_when_it_is_read() {
        let file = "[hypervisor.dragonball]\nenable_annotations = [\"default_vcpus\"]\n\
                    kernel_params = 'a=\"b\"'\n[agent.kata]\nenable_debug = true\n";
        let read = |text: String| Sourced::read(Some(Named::InPlace(text))).unwrap();
        let first = read(file.to_owned());
        let shown = toml(&first);
        let line = "enable_debug = true # the runtime options of containerd:5\n";
        assert!(
            shown.contains(&format!("\n[agent.kata]\n{line}")),
            "{shown}"
        );
        assert!(shown.contains("default_vcpus = 1 # default\n"), "{shown}");
        let again = read(shown.clone());
        let values = |sourced: &Sourced| -> Vec<_> {
            sourced
                .values()
                .map(|(key, value, _)| (key.name, value))
                .collect()
        };
        assert_eq!(values(&again), values(&first));
    }
}

// SPDX-License-Identifier: Apache-2.0
//! Values of keys: each function reads one kind, or says what it wants instead.

use std::ops::RangeInclusive;

use toml::Value;

pub(super) type Read<T> = Result<T, String>;

pub(super) fn text(value: &Value) -> Read<&str> {
    value.as_str().ok_or_else(|| "wants a string".to_owned())
}

pub(super) fn path(value: &Value) -> Read<&str> {
    text(value)
        .ok()
        .filter(|path| path.starts_with('/'))
        .ok_or_else(|| "wants an absolute path".to_owned())
}

pub(super) fn flag(value: &Value) -> Read<bool> {
    value
        .as_bool()
        .ok_or_else(|| "wants true or false".to_owned())
}

/// A whole number in a range.
pub(super) fn number<T>(value: &Value, range: RangeInclusive<T>) -> Read<T>
where
    T: TryFrom<i64> + PartialOrd + Copy + std::fmt::Display,
{
    value
        .as_integer()
        .and_then(|number| T::try_from(number).ok())
        .filter(|number| range.contains(number))
        .ok_or_else(|| format!("wants a number from {} to {}", range.start(), range.end()))
}

/// A number that may have a fraction.
pub(super) fn fraction(value: &Value) -> Option<f64> {
    let whole = value
        .as_integer()
        .and_then(|number| i32::try_from(number).ok());
    whole.map(f64::from).or_else(|| value.as_float())
}

/// One of several words, each with what it stands for.
pub(super) fn word<T: Copy>(value: &Value, words: &[(&str, T)]) -> Read<T> {
    let wanted = value.as_str();
    let found = words.iter().find(|(word, _)| Some(*word) == wanted);
    found.map(|(_, meaning)| *meaning).ok_or_else(|| {
        let accepted: Vec<_> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
        format!("wants one of {}", accepted.join(", "))
    })
}

/// The word that stands for a meaning.
pub(super) fn name<T: PartialEq>(meaning: &T, words: &[(&str, T)]) -> Value {
    let found = words.iter().find(|(_, other)| other == meaning);
    Value::from(found.map_or("", |(word, _)| word))
}

pub(super) fn texts(value: &Value) -> Read<Vec<String>> {
    value
        .as_array()
        .and_then(|list| {
            let texts = list.iter().map(|text| text.as_str().map(ToOwned::to_owned));
            texts.collect()
        })
        .ok_or_else(|| "wants a list of strings".to_owned())
}

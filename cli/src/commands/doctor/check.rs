//! One property of the host.

use serde::Serialize;
use serde_json::Value;

/// What was found.
#[derive(Serialize)]
pub(super) struct Check {
    pub(super) name: &'static str,
    pub(super) status: Status,
    /// Whether `snap` is of little use without it.
    pub(super) required: bool,
    /// The commands and options that use it.
    pub(super) needed_for: &'static str,
    /// In words.
    pub(super) found: String,
    /// What to do if it is missing.
    pub(super) advice: Option<String>,
    /// What was found, for programs.
    pub(super) details: Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    Ok,
    Missing,
    /// `snap` does not use it.
    Unused,
}

impl Status {
    pub(super) const fn word(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Missing => "missing",
            Status::Unused => "unused",
        }
    }
}

impl Check {
    /// A property that was not looked at yet.
    pub(super) fn new(name: &'static str, needed_for: &'static str) -> Self {
        let (status, found) = (Status::Missing, String::new());
        Self {
            name,
            status,
            required: false,
            needed_for,
            found,
            advice: None,
            details: Value::Null,
        }
    }

    pub(super) fn required(self) -> Self {
        Self { required: true, ..self }
    }

    pub(super) fn ok(self, found: impl Into<String>, details: Value) -> Self {
        Self { status: Status::Ok, found: found.into(), details, ..self }
    }

    pub(super) fn unused(self, found: impl Into<String>, details: Value) -> Self {
        Self { status: Status::Unused, ..self.ok(found, details) }
    }

    pub(super) fn missing(self, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { status: Status::Missing, found: found.into(), advice: Some(advice.into()), ..self }
    }
}

//! The answers of the control socket.

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::http::write_response;

/// An answer: a status and perhaps JSON.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) body: Option<Value>,
}

impl Response {
    pub(super) fn fault(status: u16, message: impl Into<String>) -> Self {
        Self { status, body: Some(json!({ "fault_message": message.into() })) }
    }

    pub(super) fn write(&self, out: &mut impl Write, keep_alive: bool) -> io::Result<()> {
        let json = self.body.as_ref().map(|body| format!("{body}\n"));
        let body = json.as_deref().map(|json| ("application/json", json));
        write_response(out, self.status, body, keep_alive)
    }
}

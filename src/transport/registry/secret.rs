//! A password or token.

/// A password or token. It has no `Debug`, `Display` or `Serialize`, so that it cannot get into a
/// message, a log or a file by accident.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(Box<str>);

impl Secret {
    /// Takes a secret.
    pub(super) fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// The secret itself, to be sent.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

//! What a server sends, made fit for a message: short, and without control characters.

use serde::Deserialize;
use serde_json::Value;

use crate::text::one_line;

/// The most characters of a server's words that a message shows.
const SHOWN: usize = 256;

/// A server's words: control characters escaped, cut at 256 characters.
pub(super) fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", one_line(text.get(..end).unwrap_or_default())),
        None => one_line(text).into_owned(),
    }
}

/// The text of a `Warning` header (distribution-spec, "Warnings": `299 - "TEXT"`); `None` where it is another kind.
pub(super) fn of_warning(header: &str) -> Option<String> {
    let quoted = header.trim().strip_prefix("299 - \"")?.strip_suffix('"')?;
    let mut text = String::new();
    let mut chars = quoted.chars();
    while let Some(c) = chars.next() {
        text.push(if c == '\\' { chars.next()? } else { c });
    }
    Some(shown(&text)).filter(|text| !text.is_empty())
}

/// What the body of an error says (distribution-spec, "Error Codes"): `CODE: message`, or its
/// first words where it is of another kind.
///
/// Elements are read one by one as JSON, since a code that `oci_spec`'s enumeration does not know
/// would make it refuse all of them.
pub(super) fn of_error(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Body {
        errors: Vec<Value>,
    }
    let parts = |error: &Value| {
        let text = |field: &str| error.get(field).and_then(Value::as_str).filter(|text| !text.is_empty());
        match (text("code"), text("message")) {
            (Some(code), Some(message)) => Some(format!("{code}: {message}")),
            (code, message) => code.or(message).map(str::to_string),
        }
    };
    let said = match serde_json::from_slice::<Body>(body) {
        Ok(Body { errors }) => errors.iter().take(3).filter_map(parts).collect::<Vec<_>>().join("; "),
        Err(_) => String::from_utf8_lossy(body).trim().to_string(),
    };
    shown(&said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_server_are_short_and_tame() {
        assert_eq!(shown("a\x1b[31m\r\nb"), "a\\u{1b}[31m\\r\\nb");
        assert_eq!(shown("a\u{202e}b"), "a\\u{202e}b");
        assert_eq!(shown(&"x".repeat(1000)).chars().count(), SHOWN + 1);
    }

    #[test]
    fn warnings_have_one_form() {
        let text = |text: &str| Some(text.to_string());
        assert_eq!(of_warning(r#"299 - "it is \"old\"""#), text(r#"it is "old""#));
        assert_eq!(of_warning("299 - \"a\u{1b}b\""), text("a\\u{1b}b"));
        for other in [
            "",
            "299",
            "299 -",
            "299 - x",
            "299 - \"",
            "299 - \"\"",
            "299 - \"\\\"",
            "199 - \"x\"",
            "299 h \"x\"",
        ] {
            assert_eq!(of_warning(other), None, "{other}");
        }
        let long = format!("299 - \"{}\"", "x".repeat(5000));
        assert_eq!(of_warning(&long).map(|text| text.chars().count()), Some(SHOWN + 1));
    }

    #[test]
    fn errors_of_registries_and_of_others() {
        let error =
            br#"{"errors":[{"code":"NAME_UNKNOWN","message":"no such repository","detail":{"a":1}}]}"#;
        assert_eq!(of_error(error), "NAME_UNKNOWN: no such repository");
        let own = br#"{"errors":[{"code":"SOMETHING_OF_OURS","message":""},{"message":"m"}]}"#;
        assert_eq!(of_error(own), "SOMETHING_OF_OURS; m");
        assert_eq!(of_error(b"404 page not found\n"), "404 page not found");
        assert_eq!(of_error(b"\xff\x00"), "\u{fffd}\\u{0}");
        assert_eq!(of_error(br#"{"errors":null}"#), r#"{"errors":null}"#);
    }
}

//! How a registry asks who asks, and what is shown to it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use gaia_egress::site::Quoted;
use http::header::{self, HeaderMap, HeaderValue};
use serde::Deserialize;

use crate::settings::Credentials;

/// A challenge that can be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// With user and password.
    Basic,
    /// With a token that a service gives out.
    Bearer {
        /// The service's address.
        realm: String,
        /// What the registry is called there.
        service: Option<String>,
        /// What for.
        scope: Option<String>,
    },
}

impl Challenge {
    /// The one to answer of those in a 401: a token rather than the password itself.
    ///
    /// # Errors
    /// What stands there instead.
    pub(crate) fn of(headers: &HeaderMap) -> Result<Self, String> {
        let mut others = Vec::new();
        let mut basic = false;
        for value in headers.get_all(header::WWW_AUTHENTICATE) {
            let text = value.to_str().map_err(|_| "WWW-Authenticate is not text")?;
            let challenges = http_auth::parse_challenges(text)
                .map_err(|_| format!("WWW-Authenticate is malformed: {}", Quoted::new(text)))?;
            for challenge in challenges {
                let parameter = |name: &str| {
                    let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                    found.map(|(_, value)| value.to_unescaped()).filter(|value| !value.is_empty())
                };
                if challenge.scheme.eq_ignore_ascii_case("Bearer") {
                    let realm = parameter("realm").ok_or("a Bearer challenge without a realm, who gives tokens")?;
                    return Ok(Self::Bearer { realm, service: parameter("service"), scope: parameter("scope") });
                }
                basic |= challenge.scheme.eq_ignore_ascii_case("Basic");
                others.push(Quoted::new(challenge.scheme).to_string());
            }
        }
        match basic {
            true => Ok(Self::Basic),
            false if others.is_empty() => Err("401 without WWW-Authenticate".into()),
            false => Err(format!("by {}, and only Bearer and Basic are known", others.join(", "))),
        }
    }
}

impl Credentials {
    /// As `Authorization` of the scheme Basic, if there is a password.
    pub(crate) fn basic(&self) -> Option<HeaderValue> {
        let Self::Password { user, password } = self else { return None };
        secret(&format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
    }
}

/// As `Authorization` of the scheme Bearer; `None` if it cannot stand in a header.
pub(crate) fn bearer(token: &str) -> Option<HeaderValue> {
    let word = !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic());
    word.then(|| secret(&format!("Bearer {token}"))).flatten()
}

/// Not printed, nor kept in HTTP/2's tables.
fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// What a token service answers.
#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
}

/// The token in a service's answer, as `Authorization`.
pub(crate) fn token(answer: &[u8]) -> Option<HeaderValue> {
    let answer: Answer = serde_json::from_slice(answer).ok()?;
    bearer(&answer.token.or(answer.access_token)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn challenge(values: &[&str]) -> Result<Challenge, String> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_str(value).unwrap());
        }
        Challenge::of(&headers)
    }

    #[test]
    fn the_challenges_of_registries_are_understood() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
            scope: scope.map(Into::into),
        };
        for (values, wanted) in [
            (
                &[
                    r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#,
                ][..],
                bearer("https://auth.docker.io/token", Some("registry.docker.io"), Some("repository:a/b:pull,push")),
            ),
            (&[r#"bearer Realm="https://a.example/t", service="""#], bearer("https://a.example/t", None, None)),
            (&[r#"Basic realm="Registry Realm""#], Challenge::Basic),
            (
                &[r#"Basic realm="a""#, r#"Bearer realm="https://b/t",error="invalid_token""#],
                bearer("https://b/t", None, None),
            ),
            (&[r#"Negotiate, Basic realm="a""#], Challenge::Basic),
        ] {
            assert_eq!(challenge(values), Ok(wanted), "{values:?}");
        }
        for (values, why) in [
            (&[][..], "without WWW-Authenticate"),
            (&["Negotiate"], "only Bearer and Basic"),
            (&[r#"Bearer service="a""#], "without a realm"),
            (&[r#"Bearer realm="a"#], "malformed"),
        ] {
            assert!(challenge(values).unwrap_err().contains(why), "{values:?}");
        }
    }

    #[test]
    fn a_token_is_a_word() {
        assert_eq!(token(br#"{"token":"abc","expires_in":300}"#).unwrap(), "Bearer abc");
        assert_eq!(token(br#"{"access_token":"abc"}"#).unwrap(), "Bearer abc");
        for not in [&br#"{"token":""}"#[..], br#"{"token":"a\r\nb"}"#, br#"{"token":"a b"}"#, b"{}", b"", b"[]", b"abc"]
        {
            assert_eq!(token(not), None, "{}", String::from_utf8_lossy(not));
        }
    }

    #[test]
    fn a_header_does_not_print_what_is_secret() {
        let credentials = Credentials::Password { user: "user".into(), password: "pass".into() };
        let basic = credentials.basic().unwrap();
        assert_eq!(basic, "Basic dXNlcjpwYXNz");
        assert_eq!(format!("{basic:?} {:?}", bearer("x").unwrap()), "Sensitive Sensitive");
    }

    proptest! {
        #[test]
        fn any_challenge_is_read_or_told_why_not(
            text in "((Bearer|Basic|[ -~]{0,8}) )?([a-z]{1,6}=\"?[ -~]{0,12}\"?[, ]{0,2}){0,4}",
        ) {
            let _ = challenge(&[&text]);
        }
    }
}

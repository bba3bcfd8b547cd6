//! Signatures of HTTP requests: Standard Webhooks
//! (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>)
//! and a plain HMAC of the body.

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::{
    config::Secret,
    error::{Class, Classify, Result},
};

/// Signs by the Standard Webhooks scheme.
pub(super) struct Signer {
    key: Vec<u8>,
}

impl Signer {
    /// `whsec_` and base64, or plain text.
    pub(super) fn new(secret: &Secret) -> Result<Self> {
        let key = match secret.expose().strip_prefix("whsec_") {
            // The cause would quote a part of the secret.
            Some(encoded) => STANDARD.decode(encoded).map_err(|_| {
                crate::error::Error::config("`signing_secret` is not base64 after `whsec_`")
                    .remedy("write `whsec_` and padded base64, or plain text without that prefix")
            })?,
            None => secret.expose().as_bytes().to_vec(),
        };
        Ok(Self { key })
    }

    /// `v1,` and the base64 HMAC-SHA256 of `id.timestamp.body`.
    pub(super) fn sign(&self, id: &str, timestamp: i64, body: &[u8]) -> Result<String> {
        let head = format!("{id}.{timestamp}.");
        Ok(format!("v1,{}", STANDARD.encode(hmac_sha256(&self.key, &[head.as_bytes(), body])?)))
    }
}

/// The hex HMAC-SHA256 of the body.
pub(super) fn plain(secret: &Secret, body: &[u8]) -> Result<String> {
    Ok(hex::encode(hmac_sha256(secret.expose().as_bytes(), &[body])?))
}

fn hmac_sha256(key: &[u8], parts: &[&[u8]]) -> Result<[u8; 32]> {
    let mac = Hmac::<Sha256>::new_from_slice(key);
    let mut mac = mac.class(Class::Bug, || "HMAC refuses a key")?;
    parts.iter().for_each(|part| mac.update(part));
    Ok(mac.finalize().into_bytes().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification's reference libraries.
    #[test]
    fn the_signature_is_that_of_the_standard_webhooks_libraries() {
        let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let signer = Signer::new(&secret).unwrap();
        let signed =
            signer.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, br#"{"test": 2432232314}"#);
        assert_eq!(signed.unwrap(), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    /// RFC 4231, test case 2.
    #[test]
    fn the_plain_hmac_is_that_of_the_rfc() {
        let signed = plain(&Secret::new("Jefe"), b"what do ya want for nothing?").unwrap();
        assert_eq!(signed, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }

    #[test]
    fn a_broken_secret_is_refused_without_being_shown() {
        let error = Signer::new(&Secret::new("whsec_hunter2!")).err().unwrap();
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}

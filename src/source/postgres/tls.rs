//! The source's end of TLS: a socket wrapped, and the channel that SCRAM is bound to.

use std::sync::Arc;

use rustls::{ClientConnection, StreamOwned, pki_types::ServerName};
use sha2::{Digest, Sha256, Sha384, Sha512};

use super::wire::Socket;
use crate::{
    error::{Class, Classify, Result},
    tls::Options,
};

/// Wraps a socket whose server has agreed to TLS; the handshake happens with the first bytes.
pub(super) fn wrap(
    socket: Socket,
    host: &str,
    options: &Options,
) -> Result<StreamOwned<ClientConnection, Socket>> {
    let name = ServerName::try_from(host.to_owned()).class(Class::Config, || {
        format!("the host `{host}` is neither a DNS name nor an address")
    })?;
    let connection = ClientConnection::new(Arc::new(options.configure()?), name)
        .class(Class::Config, || "cannot prepare TLS")?;
    Ok(StreamOwned::new(connection, socket))
}

/// The hash of the server's certificate that binds SCRAM to this channel
/// (`tls-server-end-point`, RFC 5929 section 4.1); `None` where its signature names no hash.
pub(super) fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    match signature_algorithm(certificate)? {
        // RFC 5929: MD5 and SHA-1 are replaced by SHA-256. The object identifiers are of PKCS #1
        // (1.2.840.113549.1.1.x) and of ANSI X9.62 (1.2.840.10045.4.x), in DER.
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 4 | 5 | 11]
        | [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01]
        | [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 2] => {
            Some(Sha256::digest(certificate).to_vec())
        }
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 12]
        | [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 3] => {
            Some(Sha384::digest(certificate).to_vec())
        }
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 13]
        | [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 4] => {
            Some(Sha512::digest(certificate).to_vec())
        }
        _ => None,
    }
}

/// `Certificate ::= SEQUENCE { tbsCertificate, signatureAlgorithm SEQUENCE { OID, .. }, .. }`.
fn signature_algorithm(certificate: &[u8]) -> Option<&[u8]> {
    let (0x30, body, _) = element(certificate)? else { return None };
    let (_, _, rest) = element(body)?;
    let (0x30, algorithm, _) = element(rest)? else { return None };
    let (0x06, identifier, _) = element(algorithm)? else { return None };
    Some(identifier)
}

/// The first DER element: its tag, its content and what follows it.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = bytes.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (length, rest) = match usize::from(*first) {
        short @ 0..0x80 => (short, rest),
        long => {
            let (digits, rest) =
                rest.split_at_checked(long - 0x80).filter(|(d, _)| d.len() <= 4)?;
            (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
        }
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((*tag, content, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// SEQUENCE { SEQUENCE { NULL }, SEQUENCE { OID }, NULL }, as far as a certificate is read.
    fn certificate(identifier: &[u8]) -> Vec<u8> {
        let wrap = |tag: u8, content: &[u8]| {
            let mut element = vec![tag, 0x81, u8::try_from(content.len()).unwrap()];
            element.extend(content);
            element
        };
        let algorithm = wrap(0x30, &wrap(0x06, identifier));
        wrap(0x30, &[wrap(0x30, &[5, 0]), algorithm, vec![5, 0]].concat())
    }

    #[test]
    fn the_channel_is_bound_by_the_hash_of_the_signature() {
        let rsa = |last: u8| certificate(&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, last]);
        let ecdsa = |last: u8| certificate(&[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, last]);
        let sha1 = rsa(5);
        assert_eq!(end_point(&sha1), Some(Sha256::digest(&sha1).to_vec()));
        for (certificate, bytes) in [
            (rsa(11), 32),
            (rsa(12), 48),
            (rsa(13), 64),
            (ecdsa(2), 32),
            (ecdsa(3), 48),
            (ecdsa(4), 64),
        ] {
            assert_eq!(end_point(&certificate).unwrap().len(), bytes);
        }
        assert_eq!(end_point(&certificate(&[0x2b, 0x65, 0x70])), None, "Ed25519 names no hash");
    }

    proptest! {
        #[test]
        fn foreign_certificates_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = end_point(&bytes);
        }
    }
}

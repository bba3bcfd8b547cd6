//! TLS as libpq's `sslmode` means it, on rustls.

use std::{path::Path, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore,
    SignatureScheme, StreamOwned,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};
use sha2::{Digest, Sha256, Sha384, Sha512};

use super::{
    url::{TlsMode, TlsOptions},
    wire::Socket,
};
use crate::error::{Class, Classify, Error, Result};

/// Wraps a socket whose server has agreed to TLS; the handshake happens with the first bytes.
pub(super) fn wrap(
    socket: Socket,
    host: &str,
    options: &TlsOptions,
) -> Result<StreamOwned<ClientConnection, Socket>> {
    let name = ServerName::try_from(host.to_owned()).class(Class::Config, || {
        format!("the host `{host}` is neither a DNS name nor an address")
    })?;
    let config = configure(options)?;
    let connection = ClientConnection::new(Arc::new(config), name)
        .class(Class::Config, || "cannot prepare TLS")?;
    Ok(StreamOwned::new(connection, socket))
}

fn configure(options: &TlsOptions) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier::new(options, Arc::clone(&provider))?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .class(Class::Bug, || "the TLS provider lacks the default versions")?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    match (&options.certificate, &options.key) {
        (Some(certificate), Some(key)) => {
            let chain = certificates(certificate)?;
            let private = PrivateKeyDer::from_pem_file(key)
                .class(Class::Config, || format!("cannot read sslkey {}", key.display()))?;
            builder.with_client_auth_cert(chain, private).class(Class::Config, || {
                format!("sslcert {} does not fit sslkey", certificate.display())
            })
        }
        _ => Ok(builder.with_no_client_auth()),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = || -> std::result::Result<Vec<_>, rustls::pki_types::pem::Error> {
        CertificateDer::pem_file_iter(path)?.collect()
    };
    let found = read()
        .class(Class::Config, || format!("cannot read the certificates in {}", path.display()))?;
    match found.is_empty() {
        true => Err(Error::config(format!("{} holds no certificate", path.display()))),
        false => Ok(found),
    }
}

/// Checks the server's certificate as far as `sslmode` asks for it.
#[derive(Debug)]
struct Verifier {
    /// `None`: any certificate will do.
    chain: Option<Arc<WebPkiServerVerifier>>,
    /// The roots themselves: a server's own self-signed certificate may be named as its root.
    roots: Vec<CertificateDer<'static>>,
    check_name: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(options: &TlsOptions, provider: Arc<CryptoProvider>) -> Result<Self> {
        let any = match options.mode {
            TlsMode::Disable | TlsMode::Prefer => true,
            // As libpq: with a root certificate, `require` is `verify-ca`.
            TlsMode::Require => options.root_certificate.is_none(),
            TlsMode::VerifyCa | TlsMode::VerifyFull => false,
        };
        let check_name = options.mode == TlsMode::VerifyFull;
        if any {
            return Ok(Self { chain: None, roots: Vec::new(), check_name, provider });
        }
        let roots = match &options.root_certificate {
            Some(path) => certificates(path)?,
            None => rustls_native_certs::load_native_certs().certs,
        };
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(roots.iter().cloned());
        let chain =
            WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(&provider))
                .build()
                .class(Class::Config, || "there is no usable root certificate")
                .map_err(|error| error.remedy("set sslrootcert in the source's url"))?;
        Ok(Self { chain: Some(chain), roots, check_name, provider })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        if self.roots.iter().any(|root| root == end_entity) {
            if self.check_name {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, name)?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        // The chain is verified before the name, so an error about the name means a good chain.
        match chain.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.check_name => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
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

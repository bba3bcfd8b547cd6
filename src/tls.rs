//! TLS to a PostgreSQL as libpq's `sslmode` means it, on rustls: for sources and sinks alike.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};

use crate::error::{Class, Classify, Error, Result};

/// `sslmode` and its files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) mode: Mode,
    /// Instead of the system's.
    pub(crate) roots: Option<PathBuf>,
    pub(crate) certificate: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
}

/// `sslmode`, as libpq reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    Disable,
    /// TLS where the server has it, else plain text.
    #[default]
    Prefer,
    /// TLS with whatever certificate the server shows; with roots, as `VerifyCa`.
    Require,
    /// TLS with a certificate of a known authority, for any name.
    VerifyCa,
    /// TLS with a certificate of a known authority for this name.
    VerifyFull,
}

impl Mode {
    fn parse(text: &str) -> Result<Self> {
        Ok(match text {
            "disable" => Self::Disable,
            "allow" | "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => {
                return Err(Error::config("the url has an unknown sslmode")
                    .remedy("one of disable, prefer, require, verify-ca and verify-full"));
            }
        })
    }
}

impl Options {
    /// Takes an option of a URL; whether it is one of TLS.
    pub(crate) fn set(&mut self, name: &str, value: &str) -> Result<bool> {
        match name {
            "sslmode" => self.mode = Mode::parse(value)?,
            "sslrootcert" if value == "system" => self.roots = None,
            "sslrootcert" => self.roots = Some(value.into()),
            "sslcert" => self.certificate = Some(value.into()),
            "sslkey" => self.key = Some(value.into()),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What a connection is made with, with the files read.
    pub(crate) fn configure(&self) -> Result<ClientConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Verifier::new(self, Arc::clone(&provider))?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .class(Class::Bug, || "the TLS provider lacks the default versions")?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let (Some(certificate), Some(key)) = (&self.certificate, &self.key) else {
            return Ok(builder.with_no_client_auth());
        };
        let private = PrivateKeyDer::from_pem_file(key)
            .class(Class::Config, || format!("cannot read sslkey {}", key.display()))?;
        builder
            .with_client_auth_cert(certificates(certificate)?, private)
            .class(Class::Config, || {
                format!("sslcert {} does not fit sslkey", certificate.display())
            })
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
    fn new(options: &Options, provider: Arc<CryptoProvider>) -> Result<Self> {
        let any = match options.mode {
            Mode::Disable | Mode::Prefer => true,
            // As libpq: with a root certificate, `require` is `verify-ca`.
            Mode::Require => options.roots.is_none(),
            Mode::VerifyCa | Mode::VerifyFull => false,
        };
        let check_name = options.mode == Mode::VerifyFull;
        if any {
            return Ok(Self { chain: None, roots: Vec::new(), check_name, provider });
        }
        let roots = match &options.roots {
            Some(path) => certificates(path)?,
            None => rustls_native_certs::load_native_certs().certs,
        };
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(roots.iter().cloned());
        let chain =
            WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(&provider))
                .build()
                .class(Class::Config, || "there is no usable root certificate")
                .map_err(|error| {
                    error
                        .remedy("name the authority: sslrootcert in the url, or `tls_ca` of a sink")
                })?;
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

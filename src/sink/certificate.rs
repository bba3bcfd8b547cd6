//! Whether a connection failed over a certificate, which no waiting mends.

/// A certificate that is refused comes wrapped in an I/O error.
pub(super) fn is_refused(cause: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(cause);
    while let Some(error) = next {
        let io = error.downcast_ref::<std::io::Error>().and_then(|error| error.get_ref());
        let tls = io.and_then(|inner| inner.downcast_ref::<rustls::Error>());
        if matches!(tls, Some(rustls::Error::InvalidCertificate(_))) {
            return true;
        }
        next = error.source();
    }
    false
}

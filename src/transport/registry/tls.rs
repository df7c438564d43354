//! TLS for `ureq` over the `openssl` that mosfs has anyway.
//!
//! `ureq`'s own TLS takes the system's roots *or* given ones. An administrator with a private CA
//! needs both, and client certificates, which [`SslConnector`] has. Certificates are verified
//! always: there is no switch that turns it off.

use std::fmt;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openssl::pkey::PKey;
use openssl::ssl::{HandshakeError, SslConnector, SslMethod, SslStream, SslVersion};
use openssl::x509::{X509, X509VerifyResult};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport, TransportAdapter,
};

use super::error::RegistryError;

/// Certificates for one registry, beside the system's roots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Certificates {
    /// Files of CAs, PEM.
    pub authorities: Vec<PathBuf>,
    /// Client certificate and its key, PEM.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// Puts TLS around connections for `https` URLs.
pub(super) struct TlsConnector(Arc<SslConnector>);

impl TlsConnector {
    /// Trusts the system's roots and `certificates`.
    ///
    /// # Errors
    /// [`RegistryError::Config`] with the file that cannot be read; never a weaker connector.
    pub(super) fn new(certificates: &Certificates) -> Result<Self, RegistryError> {
        let wrong = |path: &Path, why: &dyn fmt::Display| RegistryError::Config {
            path: path.to_path_buf(),
            why: why.to_string(),
        };
        let roots = Path::new("the system's certificates");
        // The builder verifies peers and loads the system's roots.
        let mut builder =
            SslConnector::builder(SslMethod::tls_client()).map_err(|error| wrong(roots, &error))?;
        builder.set_min_proto_version(Some(SslVersion::TLS1_2)).map_err(|error| wrong(roots, &error))?;
        for path in &certificates.authorities {
            let pem = fs::read(path).map_err(|error| wrong(path, &error))?;
            let found = X509::stack_from_pem(&pem).map_err(|error| wrong(path, &error))?;
            if found.is_empty() {
                return Err(wrong(path, &"there is no PEM certificate in it"));
            }
            for certificate in found {
                builder.cert_store_mut().add_cert(certificate).map_err(|error| wrong(path, &error))?;
            }
        }
        if let Some((certificate, key)) = &certificates.client {
            builder.set_certificate_chain_file(certificate).map_err(|error| wrong(certificate, &error))?;
            let pem = fs::read(key).map_err(|error| wrong(key, &error))?;
            let private =
                PKey::private_key_from_pem_callback(&pem, |_| Ok(0)).map_err(|error| wrong(key, &error))?;
            builder.set_private_key(&private).map_err(|error| wrong(key, &error))?;
            builder
                .check_private_key()
                .map_err(|_| wrong(key, &format!("it is not the key of {}", certificate.display())))?;
        }
        Ok(Self(Arc::new(builder.build())))
    }
}

impl fmt::Debug for TlsConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsConnector")
    }
}

/// Why TLS failed, for a message.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct TlsFailure(String);

impl<In: Transport> Connector<In> for TlsConnector {
    type Out = Either<In, TlsTransport>;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        let Some(transport) = chained else { return Err(ureq::Error::ConnectionFailed) };
        if !details.needs_tls() || transport.is_tls() {
            return Ok(Some(Either::A(transport)));
        }
        let host = details.uri.host().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let mut adapter = TransportAdapter::new(transport.boxed(), details.current_time.clone());
        adapter.set_timeout(details.timeout);
        let stream = self.0.connect(bare, adapter).map_err(|error| failure(error, bare))?;
        let buffers =
            LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(Either::B(TlsTransport { buffers, stream })))
    }
}

/// Says what is wrong with a certificate; leaves errors of the network what they are.
fn failure(error: HandshakeError<TransportAdapter>, host: &str) -> ureq::Error {
    let other = |text: String| ureq::Error::Other(Box::new(TlsFailure(text)));
    match error {
        HandshakeError::SetupFailure(error) => other(error.to_string()),
        HandshakeError::WouldBlock(_) => ureq::Error::ConnectionFailed,
        HandshakeError::Failure(stream) => {
            let verdict = stream.ssl().verify_result();
            if verdict != X509VerifyResult::OK {
                return other(format!(
                    "the certificate of {host} is not accepted: {}",
                    verdict.error_string()
                ));
            }
            let error = stream.into_error();
            match error.into_io_error() {
                Ok(error) => ureq::Error::from(error),
                Err(error) => match error.ssl_error() {
                    Some(stack) => other(reasons(stack)),
                    None => other("the connection was closed during the handshake".into()),
                },
            }
        }
    }
}

fn reasons(stack: &openssl::error::ErrorStack) -> String {
    let reasons: Vec<_> = stack.errors().iter().filter_map(|error| error.reason()).collect();
    let text = reasons.join(", ");
    if text.contains("wrong version number") {
        format!("{text} (does this server speak plain HTTP?)")
    } else {
        text
    }
}

/// A connection with TLS.
pub(super) struct TlsTransport {
    buffers: LazyBuffers,
    stream: SslStream<TransportAdapter>,
}

impl Transport for TlsTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.stream.get_mut().set_timeout(timeout);
        let output = self.buffers.output().get(..amount).unwrap_or_default();
        // An error of the connection below comes through as it is.
        Ok(self.stream.write_all(output)?)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.stream.get_mut().set_timeout(timeout);
        let amount = self.stream.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.get_mut().get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}

impl fmt::Debug for TlsTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsTransport")
    }
}

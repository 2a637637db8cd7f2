//! Objects over TLS: the certificate of the server must be one that this host trusts.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::fake_objects::Fake;
use crate::support::{Ran, SNAP, Sample, needs_vm, run};

const KEY: &str = "/bucket/guest.snap";

/// The fake server behind TLS, and the PEM text of its certificate.
struct Tls {
    address: SocketAddr,
    certificate: String,
}

impl Tls {
    fn start(fake: &Fake) -> Self {
        let made = generate_simple_self_signed(["localhost".to_owned()]);
        let CertifiedKey { cert, signing_key } = made.expect("a certificate");
        let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("a version")
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key.into())
            .expect("they belong together");
        let (config, to) = (Arc::new(config), fake.address);
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it has an address");
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let config = Arc::clone(&config);
                // A client that refuses the certificate ends the connection.
                std::thread::spawn(move || _ = relay(config, stream, to));
            }
        });
        Self { address, certificate: cert.pem() }
    }

    fn url(&self) -> String {
        format!("https://localhost:{}{KEY}", self.address.port())
    }
}

/// Passes requests without a body to the fake server, and its answers back.
fn relay(config: Arc<ServerConfig>, stream: TcpStream, to: SocketAddr) -> std::io::Result<()> {
    let connection = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut client = BufReader::new(StreamOwned::new(connection, stream));
    let mut server = BufReader::new(TcpStream::connect(to)?);
    loop {
        let request = head(&mut client)?;
        server.get_mut().write_all(request.as_bytes())?;
        let answer = head(&mut server)?;
        let len = answer.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            let value = value.trim().parse().ok();
            value.filter(|_| name.eq_ignore_ascii_case("content-length"))
        });
        let len = if request.starts_with("HEAD") { 0 } else { len.unwrap_or(0) };
        let mut body = vec![0; len];
        server.read_exact(&mut body)?;
        client.get_mut().write_all(answer.as_bytes())?;
        client.get_mut().write_all(&body)?;
        client.get_mut().flush()?;
    }
}

fn head(reader: &mut impl BufRead) -> std::io::Result<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(head)
}

#[track_caller]
fn info(url: &str, cache: &Path, trusted: Option<&Path>) -> Ran {
    let mut command = Command::new(SNAP);
    command.args(["info", url]).env("SNAP_CACHE", cache).env_remove("SSL_CERT_FILE");
    if let Some(trusted) = trusted {
        command.env("SSL_CERT_FILE", trusted);
    }
    run(command)
}

#[test]
fn a_trusted_server_is_read_and_an_untrusted_one_is_refused_without_a_wait() {
    needs_vm!();
    let sample = Sample::small();
    let fake = Fake::start(Duration::ZERO);
    fake.put(KEY, fs::read(&sample.file).expect("it is there"));
    let tls = Tls::start(&fake);
    let folder = tempfile::tempdir().expect("a folder");
    let trusted = folder.path().join("trusted.pem");
    fs::write(&trusted, &tls.certificate).expect("it is written");

    let started = Instant::now();
    let refused = info(&tls.url(), folder.path(), None).failed(1, &["invalid peer certificate"]);
    assert!(started.elapsed() < Duration::from_secs(10), "{}", refused.stderr);
    // Nothing was sent before the certificate was checked.
    assert!(fake.take_received().is_empty());
    let ran = info(&tls.url(), folder.path(), Some(&trusted)).ok();
    assert!(ran.stdout.contains("memory"), "{}", ran.stdout);
    assert!(!fake.take_received().is_empty());
    // The certificate is of another name.
    let other = tls.url().replace("localhost", "127.0.0.1");
    info(&other, folder.path(), Some(&trusted)).failed(1, &["invalid peer certificate"]);
}

//! Certificates for servers of the kit, made by openssl.

use std::{fs, path::Path, process::Command};

/// Makes an authority, `ca.pem`, and what it signed for `name`, such as `IP:127.0.0.1`: `server.pem`
/// and `server.key`.
pub(crate) fn certificates(folder: &Path, name: &str) {
    let openssl = |arguments: &str| {
        let output =
            Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output();
        let output = output.expect("openssl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let key = "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    openssl(&format!("{key} -x509 -days 30 -subj /CN=authority -keyout ca.key -out ca.pem"));
    openssl(&format!("{key} -subj /CN=server -keyout server.key -out server.csr"));
    fs::write(folder.join("san.cnf"), format!("subjectAltName = {name}\n")).expect("san.cnf");
    openssl(
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 \
         -extfile san.cnf -out server.pem",
    );
}

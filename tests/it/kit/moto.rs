//! A store that speaks S3's protocol with logins and conditional writes: PyPI's `moto`.

use std::{
    fs::File,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::{cluster::free_port, proxy::Proxy, scratch::Scratch, server::http_client, wait::tail};

const VERSION: &str = "5.2.5";
const START_LIMIT: Duration = Duration::from_secs(60);
/// Anybody may do what makes the login and the bucket; from then on a login is needed.
const FREE_REQUESTS: &str = "4";
const POLICY: &str =
    r#"{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:*","Resource":"*"}]}"#;

/// A running store with one bucket. It keeps everything in memory, so that an outage is one of the
/// connections: they pass through a proxy.
#[derive(Debug)]
pub(crate) struct Moto {
    child: Child,
    pub(crate) proxy: Proxy,
    pub(crate) access_key_id: String,
    pub(crate) secret_access_key: String,
    scratch: Scratch,
    _port_lock: File,
}

impl Moto {
    /// With `scripts/install.sh test` it is below `$WALRACE_CACHE`.
    pub(crate) async fn start() -> Self {
        let cache =
            std::env::var_os("WALRACE_CACHE").unwrap_or_else(|| "/var/cache/walrace".into());
        let program = Path::new(&cache).join(format!("moto-{VERSION}/bin/moto_server"));
        assert!(program.exists(), "no {}: run scripts/install.sh test", program.display());
        let scratch = Scratch::new("moto");
        let (port, lock) = free_port();
        let log_path = scratch.path().join("out.log");
        let log = File::create(&log_path).expect("a log");
        let mut child = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .env("INITIAL_NO_AUTH_ACTION_COUNT", FREE_REQUESTS)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("moto_server");
        scratch.note("moto", child.id());
        let begin = Instant::now();
        while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            let ended = child.try_wait().expect("its state");
            if ended.is_some() || begin.elapsed() > START_LIMIT {
                let log = std::fs::read_to_string(&log_path).unwrap_or_default();
                panic!("moto is not ready ({ended:?}):\n{}", tail(&log, 30));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let url = format!("http://127.0.0.1:{port}/");
        iam(&url, &[("Action", "CreateUser")]).await;
        let policy =
            [("Action", "PutUserPolicy"), ("PolicyName", "all"), ("PolicyDocument", POLICY)];
        iam(&url, &policy).await;
        let key = iam(&url, &[("Action", "CreateAccessKey")]).await;
        let put = http_client().put(format!("{url}bucket"));
        let made = put.header("authorization", login("s3")).send().await.expect("a reply");
        assert!(made.status().is_success(), "{made:?}");
        let proxy = Proxy::to(port).await;
        Self {
            child,
            proxy,
            access_key_id: element(&key, "AccessKeyId"),
            secret_access_key: element(&key, "SecretAccessKey"),
            scratch,
            _port_lock: lock,
        }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.proxy.port())
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.scratch.forget("moto");
    }
}

async fn iam(url: &str, fields: &[(&str, &str)]) -> String {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.extend_pairs([("UserName", "walrace"), ("Version", "2010-05-08")]).extend_pairs(fields);
    let reply = http_client()
        .post(url)
        .header("authorization", login("iam"))
        .header("content-type", "application/x-www-form-urlencoded")
        .body(form.finish())
        .send()
        .await
        .expect("a reply");
    assert!(reply.status().is_success(), "{reply:?}");
    reply.text().await.expect("a body")
}

/// As long as anybody may, it only says which service is asked.
fn login(service: &str) -> String {
    let scope = format!("x/20260101/us-east-1/{service}/aws4_request");
    format!("AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=x")
}

fn element(xml: &str, name: &str) -> String {
    let after = xml.split(&format!("<{name}>")).nth(1).expect("the element");
    after.split('<').next().expect("its end").to_owned()
}

//! The node's few web pages, from request bytes to reply bytes. No socket, no clock.
//!
//! ```text
//!   bytes ──parse──▶ Incomplete            read on (never beyond MAX_HEAD bytes)
//!                    Request { page, .. }  ──respond──▶ reply bytes
//! ```
//!
//! Whoever owns the socket drops [`Request::consumed`] bytes after answering and parses again, which serves pipelined
//! requests; when [`Request::keep_alive`] is false it closes after the reply. A request that cannot be understood is a
//! [`Request`] too, for an error page, and always closes: where it ends cannot be known. The same goes for requests with a
//! body, which no page here wants, so no body is ever read.
//!
//! Bounded: a head has at most [`MAX_HEAD`] bytes and 64 headers. There is no TLS, no compression and no path below `/`.

use httparse::Status;

/// The most bytes that a request's head may have; a caller need never keep more.
pub const MAX_HEAD: usize = 8 << 10;
/// The most headers of a request.
const MAX_HEADERS: usize = 64;

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// `/`: what there is here.
    Index,
    /// `/metrics`, in Prometheus's text format.
    Metrics,
    /// `/healthz`: whether the process works at all.
    Health,
    /// `/readyz`: whether clients may be sent here, and the next node be restarted.
    Ready,
    /// Something else: 404.
    NotFound,
    /// A page that exists, with a method other than GET and HEAD: 405.
    MethodNotAllowed,
    /// Not HTTP, or with a body: 400.
    BadRequest,
    /// A head beyond the bounds: 431.
    TooLarge,
    /// Nothing was asked yet: too many connections are open. 503.
    Busy,
}

/// A request that was understood, or that is answered with an error page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it wants.
    pub page: Page,
    /// Bytes of the input that it takes.
    pub consumed: usize,
    /// Whether the connection stays open after the reply.
    pub keep_alive: bool,
    /// Whether only the reply's head is wanted (HEAD).
    pub head_only: bool,
}

/// What the first bytes of an input are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The beginning of a request: read on. The input has fewer than [`MAX_HEAD`] bytes.
    Incomplete,
    /// A request.
    Request(Request),
}

/// What the pages show.
#[derive(Clone, Copy, Debug)]
pub struct Content<'a> {
    /// The metrics page; asked for [`Page::Metrics`] only.
    pub metrics: &'a str,
    /// Whether clients may be sent here; false while the node stops, and until a member has its copies.
    pub ready: bool,
}

/// Looks at the first request of `input`.
pub fn parse(input: &[u8]) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let head = &input[..input.len().min(MAX_HEAD)];
    let consumed = match request.parse(head) {
        Ok(Status::Complete(consumed)) => consumed,
        Ok(Status::Partial) if head.len() < MAX_HEAD => return Parsed::Incomplete,
        Ok(Status::Partial) | Err(httparse::Error::TooManyHeaders) => return refuse(Page::TooLarge, input.len()),
        Err(_) => return refuse(Page::BadRequest, input.len()),
    };
    let mut keep_alive = request.version == Some(1);
    for header in &*request.headers {
        let value = header.value.trim_ascii();
        if header.name.eq_ignore_ascii_case("connection") {
            for token in value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
                if token.eq_ignore_ascii_case(b"close") {
                    keep_alive = false;
                } else if token.eq_ignore_ascii_case(b"keep-alive") {
                    keep_alive = true;
                }
            }
        } else if header.name.eq_ignore_ascii_case("transfer-encoding")
            || header.name.eq_ignore_ascii_case("content-length") && value != b"0"
        {
            let page = if is_read(request.method) { Page::BadRequest } else { Page::MethodNotAllowed };
            return refuse(page, input.len());
        }
    }
    let path = request.path.unwrap_or("/").split('?').next().unwrap_or("/");
    let page = match path {
        "/" => Page::Index,
        "/metrics" => Page::Metrics,
        "/healthz" => Page::Health,
        "/readyz" => Page::Ready,
        _ => Page::NotFound,
    };
    let page = if page == Page::NotFound || is_read(request.method) { page } else { Page::MethodNotAllowed };
    Parsed::Request(Request { page, consumed, keep_alive, head_only: request.method == Some("HEAD") })
}

fn is_read(method: Option<&str>) -> bool {
    matches!(method, Some("GET" | "HEAD"))
}

fn refuse(page: Page, consumed: usize) -> Parsed {
    Parsed::Request(Request { page, consumed, keep_alive: false, head_only: false })
}

/// Appends what a connection beyond the limit reads before it is closed.
pub fn refuse_connection(out: &mut Vec<u8>) {
    let request = Request { page: Page::Busy, consumed: 0, keep_alive: false, head_only: false };
    respond(&request, Content { metrics: "", ready: true }, out);
}

/// Appends the reply to `request`.
pub fn respond(request: &Request, content: Content<'_>, out: &mut Vec<u8>) {
    const TEXT: &str = "text/plain; charset=utf-8";
    const INDEX: &str = "<!doctype html><title>GridKV</title><h1>GridKV</h1><ul>\
        <li><a href=\"/metrics\">/metrics</a>: counters of every core, for Prometheus\
        <li><a href=\"/healthz\">/healthz</a>: the process works\
        <li><a href=\"/readyz\">/readyz</a>: clients may be sent here</ul>\n";
    let (status, kind, body) = match request.page {
        Page::Index => ("200 OK", "text/html; charset=utf-8", INDEX),
        Page::Metrics => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", content.metrics),
        Page::Health => ("200 OK", TEXT, "ok\n"),
        Page::Ready if content.ready => ("200 OK", TEXT, "ready\n"),
        Page::Ready => ("503 Service Unavailable", TEXT, "not ready\n"),
        Page::NotFound => ("404 Not Found", TEXT, "no such page; there are /metrics, /healthz and /readyz\n"),
        Page::MethodNotAllowed => ("405 Method Not Allowed", TEXT, "only GET and HEAD are answered\n"),
        Page::BadRequest => ("400 Bad Request", TEXT, "this is not an HTTP request without a body\n"),
        Page::Busy => ("503 Service Unavailable", TEXT, "too many connections are open\n"),
        Page::TooLarge => ("431 Request Header Fields Too Large", TEXT, "the head of the request is too large\n"),
    };
    let allow = if request.page == Page::MethodNotAllowed { "Allow: GET, HEAD\r\n" } else { "" };
    let connection = if request.keep_alive { "keep-alive" } else { "close" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nCache-Control: no-store\r\n{allow}\
         Connection: {connection}\r\n\r\n",
        body.len()
    );
    out.extend_from_slice(head.as_bytes());
    if !request.head_only {
        out.extend_from_slice(body.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(input: &str) -> Request {
        match parse(input.as_bytes()) {
            Parsed::Request(request) => request,
            Parsed::Incomplete => panic!("incomplete: {input:?}"),
        }
    }

    fn reply(input: &str) -> String {
        let mut out = Vec::new();
        respond(&request(input), Content { metrics: "gridkv_cores 1\n", ready: true }, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn pages_are_found() {
        for (line, page) in [
            ("GET / HTTP/1.1", Page::Index),
            ("GET /metrics HTTP/1.1", Page::Metrics),
            ("HEAD /metrics HTTP/1.0", Page::Metrics),
            ("GET /metrics?name[]=x HTTP/1.1", Page::Metrics),
            ("GET /healthz HTTP/1.1", Page::Health),
            ("GET /readyz HTTP/1.1", Page::Ready),
            ("GET /metrics/ HTTP/1.1", Page::NotFound),
            ("POST /nothing HTTP/1.1", Page::NotFound),
            ("POST /metrics HTTP/1.1", Page::MethodNotAllowed),
            ("DELETE / HTTP/1.1", Page::MethodNotAllowed),
        ] {
            let input = format!("{line}\r\nHost: x\r\n\r\n");
            let request = request(&input);
            assert_eq!(request.page, page, "{line}");
            assert_eq!(request.consumed, input.len(), "{line}");
        }
    }

    #[test]
    fn every_beginning_of_a_request_is_incomplete() {
        let input = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";
        for end in 0..input.len() {
            assert_eq!(parse(&input[..end]), Parsed::Incomplete, "{end}");
        }
        // Requests that come together are taken one by one.
        let two = [&input[..], input].concat();
        assert!(matches!(parse(&two), Parsed::Request(r) if r.consumed == input.len()));
    }

    #[test]
    fn a_connection_stays_open_as_its_version_and_headers_say() {
        for (head, keep_alive) in [
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: close\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nconnection: Upgrade, CLOSE\r\n\r\n", false),
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", true),
        ] {
            assert_eq!(request(head).keep_alive, keep_alive, "{head:?}");
        }
    }

    #[test]
    fn what_is_no_request_is_refused_and_closes() {
        let long = format!("GET / HTTP/1.1\r\nX: {}", "a".repeat(MAX_HEAD));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_HEADERS + 1));
        for (input, page) in [
            ("\0\x01\r\n\r\n", Page::BadRequest),
            ("*1\r\n$4\r\nPING\r\n", Page::BadRequest),
            ("GET / HTTP/9.9\r\n\r\n", Page::BadRequest),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", Page::BadRequest),
            ("GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", Page::BadRequest),
            ("POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", Page::MethodNotAllowed),
            (&long, Page::TooLarge),
            (&many, Page::TooLarge),
            (&"a".repeat(200_000), Page::TooLarge),
        ] {
            let request = request(input);
            assert_eq!(request.page, page, "{input:.60}");
            assert!(!request.keep_alive);
            assert_eq!(request.consumed, input.len());
        }
    }

    #[test]
    fn replies_are_whole() {
        assert_eq!(
            reply("GET /metrics HTTP/1.1\r\n\r\n"),
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: 15\r\n\
             Cache-Control: no-store\r\nConnection: keep-alive\r\n\r\ngridkv_cores 1\n"
        );
        let head = reply("HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(head.contains("Content-Length: 15\r\n") && head.ends_with("\r\n\r\n"));
        assert!(reply("PUT / HTTP/1.1\r\n\r\n").contains("\r\nAllow: GET, HEAD\r\n"));
        assert!(reply("GET /x HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
        assert!(reply("bad\r\n\r\n").starts_with("HTTP/1.1 400 "));
        let mut refused = Vec::new();
        refuse_connection(&mut refused);
        let refused = String::from_utf8(refused).unwrap();
        assert!(refused.starts_with("HTTP/1.1 503 ") && refused.contains("\r\nConnection: close\r\n"), "{refused}");
    }

    #[test]
    fn readiness_is_told_by_the_status() {
        let mut out = Vec::new();
        respond(&request("GET /readyz HTTP/1.1\r\n\r\n"), Content { metrics: "", ready: false }, &mut out);
        assert!(out.starts_with(b"HTTP/1.1 503 "));
    }
}

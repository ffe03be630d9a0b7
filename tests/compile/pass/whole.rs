//! Most of it in one program: state on every executor, keys with owners, an axum router as a part of a service, a host's
//! tokio runtime, and a drain at the end.

use axum::{Router, extract::State, routing::get};
use bytes::Bytes;
use ringleader::{
    Body, BoxError, Method, Request, Response, Running, Server, Service, Shard, ShardLocal, Stop, service_fn, test,
};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::time::Duration;

/// Not `Sync`: every executor has one.
#[derive(Default)]
struct Store(RefCell<HashMap<String, Bytes>>);

struct Application {
    shard: Shard,
    hits: Cell<u64>,
}

/// Its future is `Send`, though `Shard` is not.
async fn hits(State(application): State<ShardLocal<Application>>) -> String {
    application.hits.set(application.hits.get() + 1);
    application.shard.sleep(Duration::from_millis(1)).await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    format!("{} {}", application.shard.id(), application.hits.get())
}

async fn start() -> Result<Running, BoxError> {
    let mut builder = Server::builder().listen("127.0.0.1:0").executors(2..=4).tokio(tokio::runtime::Handle::current());
    let store = builder.sharded("store", async |_| Ok(Store::default()));
    let server = builder.serve(async move |shard: Shard| {
        let application = shard.local(Application { shard: shard.clone(), hits: 0.into() });
        let router = ringleader::axum(Router::new().route("/hits", get(hits)).with_state(application));
        let store = store.clone();
        Ok(service_fn(async move |request: Request| {
            let key = request.uri().path().to_owned();
            if key == "/hits" {
                return Ok(router.call(request).await?.map(Body::new));
            }
            let owner = shard.peers().owner_of(&key);
            if request.method() == Method::PUT {
                // `?` answers 413 and 400.
                let value = request.into_body().collect(1 << 20).await?;
                store.call(owner, async move |store| drop(store.0.borrow_mut().insert(key, value))).await?;
                return Ok(Response::new(Body::empty()));
            }
            let value = store.call(owner, async move |store| store.0.borrow().get(&key).cloned()).await?;
            Ok(Response::new(value.unwrap_or_default().into()))
        }))
    });
    Ok(server.start().await?)
}

pub fn main() -> Result<(), BoxError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let running = runtime.block_on(start())?;
    let address = running.local_addrs()[0];
    for key in ["/one", "/two", "/three"] {
        let put = Request::put(key).body(key)?;
        assert_eq!(test::send(address, put)?.status(), 200);
        // By another connection, and so perhaps from another executor.
        assert_eq!(test::get(address, key)?.body(), key);
    }
    let too_much = Request::put("/much").body(vec![0; (1 << 20) + 1])?;
    assert_eq!(test::send(address, too_much)?.status(), 413);
    assert_eq!(test::get(address, "/hits")?.body().last(), Some(&b'1'));
    let exit = runtime.block_on(running.stop(Stop::Drain(Duration::from_secs(30))))?;
    assert!(exit.drained);
    Ok(())
}

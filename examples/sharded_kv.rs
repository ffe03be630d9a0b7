//! How does a request reach the executor that has what it asks for?
//!
//! A key-value store of which each executor has a part, without a lock anywhere: each key lives on the executor that owns
//! it, and a request that came in elsewhere sends a closure there. It is lost with its executor's generation, and the
//! number of executors is fixed: with scaling, keys change their owners and leave their values behind (see `Peers`).
//!
//! ```sh
//! cargo run --example sharded_kv
//! curl -s -X PUT -d 'hello' http://127.0.0.1:8080/greeting
//! for i in 1 2 3 4; do curl -si http://127.0.0.1:8080/greeting | grep -v date; done
//! curl -s http://127.0.0.1:8080/
//! ```

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use ringleader::{
    Body, BoxError, Error, Method, PeerError, Reject, Request, Response, Server, Shard, Sharded, StatusCode, service_fn,
};

/// Values of the keys that one executor owns: neither `Send` nor `Sync`.
type Part = RefCell<HashMap<String, Vec<u8>>>;

fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let mut builder = Server::builder().listen(address).executors(4).stop_on_signals();
    let store = builder.sharded("store", async |_| Ok(Part::default()));
    let server = builder.serve(async move |shard: Shard| {
        let store = store.clone();
        Ok(service_fn(async move |request: Request| answer(&shard, &store, request).await))
    });
    server.run().map(drop)
}

async fn answer(shard: &Shard, store: &Sharded<Part>, request: Request) -> Result<Response, BoxError> {
    let key = request.uri().path().trim_start_matches('/').to_owned();
    if key.is_empty() {
        return count(store).await;
    }
    let owner = shard.peers().owner_of(&key);
    let found = match *request.method() {
        Method::GET => {
            // What crosses over is `Send`: the key on its way there, a copy of the value on its way back. The part stays.
            let value = store.call(owner, async move |part: Rc<Part>| part.borrow().get(&key).cloned());
            value.await.map_err(unavailable)?
        }
        Method::PUT => {
            let value = request.into_body().collect(1 << 20).await?.to_vec();
            let put = store.call(owner, async move |part| drop(part.borrow_mut().insert(key, value)));
            put.await.map_err(unavailable)?;
            Some(Vec::new())
        }
        _ => return Err(Reject::new(StatusCode::METHOD_NOT_ALLOWED, "GET and PUT are what there is").into()),
    };
    let response = Response::builder().header("x-owner", owner.index()).header("x-answered-by", shard.id().index());
    Ok(match found {
        Some(value) => response.body(Body::from(value))?,
        None => response.status(StatusCode::NOT_FOUND).body(Body::empty())?,
    })
}

/// How many keys each executor has.
async fn count(store: &Sharded<Part>) -> Result<Response, BoxError> {
    let mut text = String::new();
    for (slot, keys) in store.call_all(async |part| part.borrow().len()).await? {
        let keys = keys.map_or_else(|error| error.to_string(), |keys| format!("{keys} keys"));
        text += &format!("executor {slot}: {keys}\n");
    }
    Ok(Response::new(Body::from(text)))
}

/// A client had better come again; what it wanted to put may be there all the same.
fn unavailable(error: PeerError) -> BoxError {
    Reject::new(StatusCode::SERVICE_UNAVAILABLE, error).into()
}

//! What may go to another thread, and what may be shared between threads: a host keeps it where it likes.

use ringleader::test::App;
use ringleader::{
    Blocking, Body, BoxError, Builder, Call, Handle, Order, Peers, Request, Response, Running, Server, Shard,
    ShardLocal, Sharded, Sleep, Timeout, service_fn,
};
use std::future::Ready;
use std::rc::Rc;

type OfNoThread = Rc<()>;

fn send<T: Send>() {}
fn sync<T: Sync>() {}

pub fn main() -> Result<(), BoxError> {
    send::<(Builder, Server, Running, Order<Running>, Body, Handle, Peers, Sharded<OfNoThread>, ShardLocal<OfNoThread>)>(
    );
    sync::<(Handle, Peers, Sharded<OfNoThread>, ShardLocal<OfNoThread>)>();
    send::<(Call<u8>, Sleep, Blocking<u8>, Timeout<Ready<()>>)>();
    let app = App::start(async |_: Shard| Ok(service_fn(async |_: Request| Ok(Response::new(Body::from("here"))))))?;
    assert_eq!(
        std::thread::scope(|scope| scope.spawn(|| app.get("/")).join().expect("it does not panic"))?.body(),
        "here"
    );
    Ok(())
}

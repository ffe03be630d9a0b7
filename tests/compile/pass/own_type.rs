//! The trait by hand.

use ringleader::test::App;
use ringleader::{Body, BoxError, Request, Response, Service, Shard};
use std::cell::Cell;

struct Application(Cell<u8>);

impl Service for Application {
    type Body = Body;

    async fn call(&self, _: Request) -> Result<Response, BoxError> {
        self.0.set(self.0.get() + 1);
        Ok(Response::new(Body::from(self.0.get().to_string())))
    }
}

pub fn main() -> Result<(), BoxError> {
    let app = App::start(async |_: Shard| Ok(Application(Cell::new(0))))?;
    app.get("/")?;
    assert_eq!(app.get("/")?.body(), "2");
    Ok(())
}

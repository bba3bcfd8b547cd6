//! stub
use crate::{change::{Batch, Op}, config, error::Result};
#[derive(Debug)]
pub struct Filter;
impl Filter {
    pub fn new(_: &config::Sink) -> Result<Self> { todo!() }
    pub fn select(_: Vec<String>, _: Vec<Op>) -> Result<Self> { todo!() }
    pub fn apply(&mut self, b: Batch) -> Batch { b }
}

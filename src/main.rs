//! The `walrace` command.

fn main() {}

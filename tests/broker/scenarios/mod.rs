//! The guarantees of the whole system, tested on a real broker and measured at the services.

mod caps;
mod decided;
mod example;
mod failing;
mod full;
mod garbage;
mod load;
mod repeated;
mod shared;

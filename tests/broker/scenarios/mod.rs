//! What the system as a whole promises, tried on the real broker and measured at the services.

mod caps;
mod example;
mod failing;
mod full;
mod garbage;
mod load;
mod repeated;

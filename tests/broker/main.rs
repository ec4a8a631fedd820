//! Tests on RabbitMQ nodes, with real processes.

#![allow(clippy::print_stdout, reason = "a test prints what it has measured")]

mod alarm;
mod alarmed;
#[path = "../support/bare.rs"]
mod bare;
mod bench;
mod bounds;
#[path = "../support/broker.rs"]
mod broker;
#[path = "../support/certificates.rs"]
mod certificates;
mod client;
mod coming_up;
mod crash;
mod direct;
mod examples;
mod frames;
mod hostile;
mod journal;
#[path = "../support/lines.rs"]
mod lines;
mod locked;
mod logs;
mod misspelt;
mod node;
mod operated;
#[path = "../support/pages.rs"]
mod pages;
mod parked;
#[path = "../support/processes.rs"]
mod processes;
#[path = "../support/proxy.rs"]
mod proxy;
mod publisher;
mod readme;
mod returned;
mod scenarios;
mod secrets;
mod service;
mod signals;
mod stand;
mod system;
mod tls;
mod topology;
mod unserved;
mod unwanted;
mod watched;

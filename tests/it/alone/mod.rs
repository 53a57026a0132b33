//! What measures: how long something takes beside something else, or what there is for all. Nothing runs beside these, while the
//! others run two at a time.

mod costs;
mod density;
mod flood;
mod hostile;
mod kills;
mod limits;
mod pinned;
mod soak;
mod strangers;

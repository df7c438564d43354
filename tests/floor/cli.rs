//! `mosfs floor` as a person and a script use it.

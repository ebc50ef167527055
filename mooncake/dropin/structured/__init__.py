"""Structured objects and DataProto batches over the store, behind upstream's names."""

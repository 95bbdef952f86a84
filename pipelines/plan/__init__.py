"""What work on a cluster will take, before it is started."""

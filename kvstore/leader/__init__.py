"""What the directory that leads does besides: tasks, orders to stores, and the operators' HTTP."""

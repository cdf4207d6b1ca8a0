"""Controls: paths through data, and the equations that they drive."""

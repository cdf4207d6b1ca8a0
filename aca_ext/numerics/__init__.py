"""Methods and step control: plain numbers, without torch."""

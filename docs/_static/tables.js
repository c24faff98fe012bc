/* Marks tables that go on to the right of what is seen, as they do on a telephone. */

function mark(container) {
  const right = container.scrollLeft + container.clientWidth;
  container.classList.toggle("goes-on", right < container.scrollWidth - 1);
}

document.addEventListener("DOMContentLoaded", () => {
  const containers = document.querySelectorAll(".pst-scrollable-table-container");
  const observer = new ResizeObserver((entries) => entries.forEach((entry) => mark(entry.target)));
  for (const container of containers) {
    container.addEventListener("scroll", () => mark(container), { passive: true });
    observer.observe(container);
  }
});

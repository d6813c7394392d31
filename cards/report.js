for (const head of document.querySelectorAll("th")) {
  const sort = () => {
    const down = head.getAttribute("aria-sort") === "ascending", body = head.closest("table").tBodies[0];
    const key = (row) => row.cells[head.cellIndex]?.textContent.trim() ?? "";
    const compare = (a, b) => {
      const [x, y] = [parseFloat(a.replace("−", "-")), parseFloat(b.replace("−", "-"))];
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) || a.localeCompare(b, undefined, {numeric: true}) : x - y;
    };
    const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(key(a), key(b)));
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
}

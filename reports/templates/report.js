
"use strict";
// The page is complete without this: it adds sorting, and Escape to close an enlarged picture.
const superscripts = "⁰¹²³⁴⁵⁶⁷⁸⁹";
function numeric(text) {
  const plain = text.replaceAll(",", "").replaceAll("−", "-").replace(/^[^\d-]+/, "")
    .replace(/ × 10(⁻?)([⁰¹²³⁴⁵⁶⁷⁸⁹]+)/, (_, minus, digits) =>
      "e" + (minus && "-") + [...digits].map((digit) => superscripts.indexOf(digit)).join(""));
  return text === "infinite" ? Infinity : parseFloat(plain);
}
function sort(table, head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const place = head.cellIndex, words = !head.classList.contains("n");
  const text = (row) => row.cells[place].textContent;
  const missing = (row) => !words && Number.isNaN(numeric(text(row)));
  const order = words
    ? (a, b) => text(a).localeCompare(text(b), "en", { numeric: true })
    : (a, b) => numeric(text(a)) - numeric(text(b)) || 0;
  const rows = [...table.tBodies[0].rows];
  // What was not measured stays at the end, whichever way the others run.
  rows.sort((a, b) => missing(a) - missing(b) || (down ? -1 : 1) * order(a, b));
  table.tBodies[0].append(...rows);
}
for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, head));
    head.append(button);
  }
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const open of document.querySelectorAll("details.zoom[open]")) open.open = false;
});

/* The search page: `kg.hessian` finds `hessian`, and pages with more of the longer words in their title come first. */

document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  let words = [];
  const performSearch = Search.performSearch;
  Search.performSearch = (query) => {
    const names = query.replace(/\b(kg|keras_gradtools)\./g, "");
    words = splitQuery(names.toLowerCase().trim());
    performSearch(names);
  };
  // A result is a list: page, title, anchor, description, score, file, kind.
  Scorer.score = (result) => {
    const title = result[1].toLowerCase();
    return result[4] + 10 * words.filter((word) => word.length > 3 && title.includes(word)).length;
  };
});
